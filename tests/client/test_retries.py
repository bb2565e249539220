"""Calls are sent again only where nothing can be applied twice, and then with the same request_id."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from sedac.client import AsyncControlClient, ControlClient, requests
from sedac.client.connection import Attempts
from sedac.errors import ControlUnavailable
from sedac.policy.model import Policy

from testing.control.engines import FIRST
from testing.control.running import RunningServer


class LossyProxy:
    """A TCP proxy that can keep back all that the service answers on the connections now open, and cut them."""

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self.is_keeping_back = False
        self._writers: list[asyncio.StreamWriter] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.address = "127.0.0.1:{1}".format(*self._server.sockets[0].getsockname())

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def cut(self) -> None:
        """Close every connection, and pass on what new ones carry."""

        async def close() -> None:
            for writer in self._writers:
                writer.close()
            self._writers.clear()
            self.is_keeping_back = False

        self._run(close())

    def close(self) -> None:
        self.cut()
        self._server.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._host, int(self._port))
        self._writers += [writer, far_writer]
        await asyncio.gather(self._pass_on(reader, far_writer, False), self._pass_on(far_reader, writer, True))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if not (is_answer and self.is_keeping_back):
                    writer.write(data)
                    await writer.drain()


@pytest.fixture
def proxy(server) -> Iterator[LossyProxy]:
    proxy = LossyProxy(server.address)
    yield proxy
    proxy.close()


@contextlib.contextmanager
def losing_the_answer(proxy: LossyProxy, direct: ControlClient, revision: int) -> Iterator[None]:
    """Let the service carry out what is asked meanwhile, keep its answer back, then cut the connection."""
    proxy.is_keeping_back = True

    def cut_once_done() -> None:
        deadline = time.monotonic() + 10
        while next(direct.list_revisions()).revision < revision and time.monotonic() < deadline:
            time.sleep(0.01)
        proxy.cut()

    cutting = threading.Thread(target=cut_once_done)
    cutting.start()
    yield
    cutting.join()


def test_a_change_whose_answer_was_lost_is_asked_for_again_and_applied_once(proxy, client):
    client.update_policy(FIRST)
    with ControlClient(proxy.address) as far:
        far.get_policy()
        with losing_the_answer(proxy, client, 2):
            made = far.update_policy(Policy(default_tier="exact"), fields=["default_tier"])
        assert made.revision == 2
        with losing_the_answer(proxy, client, 3):
            assert far.rollback(1).revision == 3
    assert [made.revision for made in client.list_revisions()] == [3, 2, 1], "nothing was applied twice"


def test_the_same_holds_for_asyncio(proxy, client):
    client.update_policy(FIRST)

    async def main() -> int:
        async with AsyncControlClient(proxy.address) as far:
            await far.get_policy()
            with losing_the_answer(proxy, client, 2):
                return (await far.update_policy(Policy(default_tier="exact"), fields=["default_tier"])).revision

    assert asyncio.run(main()) == 2
    assert [made.revision for made in client.list_revisions()] == [2, 1]


def test_without_retries_a_lost_answer_is_an_error(proxy, client):
    client.update_policy(FIRST)
    with ControlClient(proxy.address, num_retries=0) as far:
        far.get_policy()
        with losing_the_answer(proxy, client, 2), pytest.raises(ControlUnavailable):
            far.update_policy(Policy(default_tier="exact"), fields=["default_tier"])


def test_a_service_that_comes_back_in_time_is_reached(settings):
    running = RunningServer(settings)
    again = settings.model_copy(update={"port": running.server.port})
    running.stop()
    started: list[RunningServer] = []
    starting = threading.Timer(0.3, lambda: started.append(RunningServer(again)))
    starting.start()
    with ControlClient(running.address, num_retries=50, timeout_seconds=30) as client:
        assert client.update_policy(FIRST).revision == 1
    starting.join()
    started[0].stop()


def test_every_change_has_a_request_id_of_its_own_and_a_dry_run_none():
    def update(**more) -> str:
        call = requests.update_policy(FIRST, **{"fields": (), "etag": "", "comment": "", "validate_only": False, "request_id": ""} | more)
        return call.request.request_id

    def roll_back(request_id: str = "") -> str:
        return requests.roll_back(1, comment="", etag="", request_id=request_id).request.request_id

    made = {update(), update(), roll_back(), roll_back(), *(requests.start_rollout(1, {}).request.request_id for _ in range(2))}
    assert len(made) == 6
    assert "" not in made
    assert (update(request_id="mine"), roll_back("mine"), update(validate_only=True)) == ("mine", "mine", "")
    assert requests.start_rollout(FIRST, {"request_id": "mine"}).request.request_id == "mine"


def test_what_the_service_would_refuse_the_second_time_is_never_sent_again():
    for act in ("promote", "pause", "resume", "abort"):
        assert not requests.change_rollout(act, 7, comment="", etag="").is_repeatable
    assert not requests.delete_probe_set("x").is_repeatable
    assert requests.get_status().is_repeatable


class _Error(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code


def test_only_unavailable_is_worth_another_attempt_and_pauses_grow_to_their_limit():
    attempts = Attempts(None, 6)
    pauses = [attempts.find_pause(_Error(grpc.StatusCode.UNAVAILABLE)) for _ in range(7)]
    for pause, wanted in zip(pauses, (0.1, 0.2, 0.4, 0.8, 1.0, 1.0), strict=False):
        assert pause is not None
        assert 0.8 * wanted <= pause <= 1.2 * wanted
    assert pauses[6] is None
    attempts.succeed()
    assert attempts.find_pause(_Error(grpc.StatusCode.UNAVAILABLE)) is not None, "a stream that delivered starts again"
    for code in grpc.StatusCode:
        if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK):
            assert Attempts(None, 6).find_pause(_Error(code)) is None
    assert Attempts(0.01, 6).find_pause(_Error(grpc.StatusCode.UNAVAILABLE)) is None, "no time is left for another"
