"""Remote calls reach every worker of every data-parallel rank; recorded clients, for two ranks need more than one device."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from sedac.agent.engine import AttachedEngine, EngineDisagreement, PartlyRefused
from sedac.contract import wire
from sedac.contract.stats import CheckpointStats, Stats, TierStats
from sedac.errors import ArtifactError, PolicyInvalid
from sedac.policy.model import Candidate, Checkpoint, Policy

from testing.figures import make_controller, make_drafting
from testing.workers import LAYOUT, Workers

POLICY = Policy(enabled=True, checkpoints=(Checkpoint(layer=2, threshold=0.5),))
BAD = Policy(enabled=True, checkpoints=(Checkpoint(layer=3, threshold=0.5),))


class Ranks:
    """Stands in for vLLM's client of several data-parallel ranks (DPLBAsyncMPClient): its own `collective_rpc` returns the first's answers."""

    def __init__(self, count: int) -> None:
        self.ranks = [Workers() for _ in range(count)]
        self.engine_core = SimpleNamespace(core_engines=[bytes([i]) for i in range(count)], call_utility_all_async=self._call_all)

    async def _call_all(self, method, *args):
        assert method == "collective_rpc"
        name, timeout, arguments, keywords = args
        assert keywords is None
        return await asyncio.gather(*(rank.collective_rpc(name, timeout, arguments) for rank in self.ranks))

    async def collective_rpc(self, *args):
        return await self.ranks[0].collective_rpc(*args)


def test_every_rank_gets_the_policy_and_the_candidate():
    client = Ranks(3)
    engine = AttachedEngine(client=client)

    async def scenario() -> None:
        assert await engine.describe() == LAYOUT
        assert (engine.num_workers, engine.num_ranks) == (6, 3)
        assert await engine.get_faster_rows() == {"width-30": 4}
        await engine.apply(POLICY, 4, Candidate(rollout=2, policy=POLICY, share=0.5))
        assert [rank.revisions for rank in client.ranks] == [[4, 4]] * 3
        assert all(candidate["rollout"] == 2 for rank in client.ranks for candidate in rank.candidates)
        await engine.apply(POLICY, 5)
        assert all(rank.candidates == [None, None] for rank in client.ranks)
        client.ranks[2].reports["cmpl-1"] = {"tier": "balanced"}
        assert await engine.find_report("cmpl-1") == {"tier": "balanced"}

    asyncio.run(scenario())


def test_one_rank_is_asked_as_ever():
    engine = AttachedEngine(client=Ranks(1))
    asyncio.run(engine.describe())
    assert (engine.num_workers, engine.num_ranks) == (2, 1)


def test_ranks_that_have_other_things_attached_are_no_engine():
    client = Ranks(2)
    client.ranks[1].layout = replace(LAYOUT, probe_set="other")
    with pytest.raises(EngineDisagreement, match="start every rank with the same settings"):
        asyncio.run(AttachedEngine(client=client).describe())


def test_what_all_refuse_changed_nothing_and_what_some_refuse_is_told_apart():
    client = Ranks(2)
    engine = AttachedEngine(client=client)
    with pytest.raises(PolicyInvalid, match=r"checkpoints\[0\]\.layer") as refused:
        asyncio.run(engine.apply(BAD, 4))
    assert not isinstance(refused.value, PartlyRefused)
    client.ranks[1].layout = replace(LAYOUT, checkpoint_layers=(3,))
    with pytest.raises(PartlyRefused):
        asyncio.run(engine.apply(BAD, 4))


@pytest.mark.parametrize("confirmed", [{"revision": 3, "rollout": 0}, {"revision": 4, "rollout": 9}, {"revision": 4, "rollout": 0}])
def test_a_rank_that_confirms_something_else_is_told(confirmed, monkeypatch):
    client = Ranks(2)
    monkeypatch.setattr(client.ranks[1], "_sedac_apply", lambda *args: {**confirmed, "violations": []})
    with pytest.raises(EngineDisagreement, match="revision 4 with roll-out 1 was sent; restart the engine"):
        asyncio.run(AttachedEngine(client=client).apply(POLICY, 4, Candidate(rollout=1, policy=POLICY, share=0.5)))


@pytest.mark.parametrize("state", ["failed", "unknown", "strange"])
def test_a_probe_set_is_ready_when_every_worker_has_it(state):
    client = Ranks(2)
    engine = AttachedEngine(client=client)

    async def scenario() -> None:
        await engine.preload("/sets/a", "a")
        assert await engine.is_preloaded("a")
        client.ranks[1].probe_sets["a"] = {"state": "loading", "problem": ""}
        assert not await engine.is_preloaded("a")
        client.ranks[1].probe_sets["a"] = {"state": state, "problem": "no room" if state == "failed" else ""}
        assert not await engine.has("a")
        with pytest.raises(ArtifactError, match="no room" if state == "failed" else state):
            await engine.is_preloaded("a")

    asyncio.run(scenario())


def _make_stats(factor: int, revision: int = 4) -> Stats:
    return Stats(
        active_revision=revision,
        num_steps=factor,
        num_tokens=10 * factor,
        num_mlp_blocks_computed=2.5 * factor,
        checkpoints=(CheckpointStats(layer=2, num_evaluated=4 * factor, num_exited=factor, threshold=0.5, exit_rate=0.1 * factor),),
        tiers=(TierStats(name="balanced", num_tokens=factor, num_exited=factor, num_mlp_blocks_computed=1.5 * factor),)
        + ((TierStats(name="new", num_tokens=7, num_exited=0, num_mlp_blocks_computed=7.0),) if factor == 2 else ()),
        drafting=make_drafting(*(((3, 1),) if factor == 1 else ((2, 2), (2, 2))), controller=(make_controller(factor),)),
    )


def test_counters_of_ranks_add_up_and_each_rank_is_reported():
    client = Ranks(2)
    for rank, factor in zip(client.ranks, (1, 2), strict=True):
        rank.stats, rank.revisions = _make_stats(factor), [3 + factor] * 2
    found = asyncio.run(AttachedEngine(client=client).get_stats())
    assert (found.num_steps, found.num_tokens, found.num_mlp_blocks_computed) == (3, 30, 7.5)
    (checkpoint,) = found.checkpoints
    assert (checkpoint.num_evaluated, checkpoint.num_exited, checkpoint.threshold) == (12, 3, 0.5)
    assert checkpoint.exit_rate == pytest.approx((4 * 0.1 + 8 * 0.2) / 12)
    assert {tier.name: (tier.num_tokens, tier.num_mlp_blocks_computed) for tier in found.tiers} == {"balanced": (3, 4.5), "new": (7, 7.0)}
    assert [asdict(rank) for rank in found.ranks] == [
        {"rank": 0, "active_revision": 4, "num_steps": 1},
        {"rank": 1, "active_revision": 5, "num_steps": 2},
    ]
    assert [rank.active_revision for rank in wire.stats_to_report(found).ranks] == [4, 5]
    assert found.drafting == make_drafting((3, 1), (2, 2), (2, 2), controller=(make_controller(1), make_controller(2)))
    assert Stats.from_dict(asdict(found)) == found
