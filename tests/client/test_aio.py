"""The client for asyncio has the methods of the other one, and each of them works against a real control service."""

from __future__ import annotations

import asyncio
import inspect

import pytest
from sedac.client import AsyncControlClient, ControlClient
from sedac.contract import wire
from sedac.errors import ControlUnavailable, NotSynced, PolicyInvalid, RevisionNotFound
from sedac.policy.model import Checkpoint, Policy

from testing.control.engines import FIRST
from testing.control.running import RunningServer
from testing.probe_sets import make_set


def _get_methods(kind: type) -> dict[str, inspect.Signature]:
    methods = {name: method for name, method in vars(kind).items() if inspect.isfunction(method) and not name.startswith("_")}
    return {name: inspect.signature(method) for name, method in methods.items()}


def test_both_clients_have_the_same_methods_with_the_same_arguments():
    sync, aio = _get_methods(ControlClient), _get_methods(AsyncControlClient)
    assert {name: found.parameters for name, found in sync.items()} == {name: found.parameters for name, found in aio.items()}
    for name, found in sync.items():
        assert str(aio[name].return_annotation).removeprefix("Async") == found.return_annotation, name


async def _take(count, iterator):
    found = []
    async for item in iterator:
        found.append(item)
        if len(found) == count:
            break
    await iterator.aclose()
    return found


def test_policies_are_read_changed_watched_and_waited_for(server, make_engine):
    make_engine().pushes.get(timeout=10)

    async def main() -> None:
        async with AsyncControlClient(server.address, author="ops") as client:
            policy = wire.policy_from_proto(await client.get_policy())
            assert policy == FIRST
            made = await client.update_policy(Policy(default_tier="exact"), fields=["default_tier"], comment="opt-in")
            assert (made.revision, made.author) == (2, "ops")
            status = await client.wait_until_synced(2, 10)
            assert status.engines[0].active_revision == 2
            back = await client.rollback(1)
            assert await client.diff_policies(1, back.revision) == ()
            assert [change.field for change in await client.diff_policies(1, 2)] == ["default_tier"]
            assert [made.revision async for made in client.list_revisions()] == [3, 2, 1]
            assert [made.revision for made in await _take(3, client.watch_policy(1))] == [1, 2, 3]
            assert [update.policy.revision for update in await _take(1, client.watch_status(60))] == [3]
            assert [engine.engine.engine_id async for engine in client.list_engines()] == ["e1"]
            assert [len(update.engines) for update in await _take(1, client.watch_engines())] == [1]
            assert (await client.get_status()).policy.revision == 3
            assert [entry.action async for entry in client.list_audit_entries()][:2] == ["RollbackPolicy", "UpdatePolicy"]

    asyncio.run(main())


def test_probe_sets_travel_both_ways(server, tmp_path):
    directory = make_set("fresh").write(tmp_path / "set")

    async def main() -> None:
        async with AsyncControlClient(server.address) as client:
            seen: list[int] = []
            uploaded = await client.upload_probe_set(directory, progress=lambda done, total: seen.append(done))
            assert seen[-1] == uploaded.size_bytes
            assert [probe_set.name async for probe_set in client.list_probe_sets()] == ["fresh"]
            assert (await client.get_probe_set("fresh")).sha256 == make_set("fresh").sha256
            copy = await client.download_probe_set("fresh", tmp_path / "copy")
            assert (copy / "probes.safetensors").read_bytes() == (directory / "probes.safetensors").read_bytes()
            await client.delete_probe_set("fresh")
            assert [probe_set.name async for probe_set in client.list_probe_sets()] == []

    asyncio.run(main())


def test_a_roll_out_is_started_paused_resumed_and_ended(server, make_engine):
    make_engine().pushes.get(timeout=10)
    candidate = Policy(enabled=True, checkpoints=(Checkpoint(layer=2, threshold=0.75),))

    async def main() -> None:
        async with AsyncControlClient(server.address) as client:
            started = await client.start_rollout(candidate, shares=[0.1, 0.5], interval_seconds=3600, max_error_share=0.5, comment="wider")
            assert (started.number, list(started.shares), started.bounds.max_error_share) == (1, [0.1, 0.5], 0.5)
            await client.wait_until_synced(1, 10, rollout=1)
            assert (await client.pause_rollout()).state == (await client.get_rollout(1)).state
            resumed = await client.resume_rollout("rollouts/1")
            with pytest.raises(NotSynced, match="rollouts/1 is not over after 0 s: PROGRESSING"):
                await client.wait_for_rollout(1, 0)
            assert resumed.etag != started.etag
            aborting = asyncio.create_task(_abort(client))
            states = [rollout.state async for rollout in client.watch_rollout(1, 0.05)]
            assert states[-1] == (await aborting).state
            promoted = await client.start_rollout(candidate, interval_seconds=3600)
            assert (await client.promote_rollout(promoted.name)).promoted_revision == 2
            assert (await client.wait_for_rollout(2, 10)).number == 2
            assert [rollout.number async for rollout in client.list_rollouts()] == [2, 1]

    async def _abort(client: AsyncControlClient):
        await asyncio.sleep(0.2)
        return await client.abort_rollout()

    asyncio.run(main())


def test_errors_come_back_as_they_were_raised(server):
    async def main() -> None:
        async with AsyncControlClient(server.address) as client:
            with pytest.raises(RevisionNotFound):
                await client.get_policy()
            with pytest.raises(PolicyInvalid, match="default_tier"):
                await client.update_policy(Policy(default_tier="none-such"))
            with pytest.raises(NotSynced, match="no engine is connected"):
                await client.wait_until_synced(0, 0)
        async with AsyncControlClient("127.0.0.1:1", num_retries=0) as absent:
            with pytest.raises(ControlUnavailable, match="is it running"):
                await absent.get_status()
            with pytest.raises(ControlUnavailable):
                await anext(absent.watch_status())

    asyncio.run(main())


def test_a_watch_goes_on_over_a_restart(settings):
    running = RunningServer(settings)
    again = settings.model_copy(update={"port": running.server.port})
    with ControlClient(running.address) as client:
        client.update_policy(FIRST)

    async def main() -> None:
        nonlocal running
        async with AsyncControlClient(running.address, num_retries=20) as client:
            watch = client.watch_policy()
            assert (await anext(watch)).revision == 1
            await asyncio.to_thread(running.stop)
            running = await asyncio.to_thread(RunningServer, again)
            await client.update_policy(Policy())
            assert (await anext(watch)).revision == 2
            await watch.aclose()

    asyncio.run(main())
    running.stop()
