"""Requests against a real HTTP server that streams as vLLM does, and what is made of its answers."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from sedac.bench.load import Ask, ask_one, count_prompts, read_stream, run_load
from sedac.bench.matrix import Load
from sedac.errors import BenchmarkFailed


@dataclass
class Streaming:
    """A server of two tokens a piece; it notes what it was asked."""

    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    status: int = 200
    lost: int = 0
    """Tokens of which it does not send the last ones."""
    _now: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.status != 200:
            return web.Response(status=self.status, text="no such tier")
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        response = web.StreamResponse()
        await response.prepare(request)
        for start in range(0, body["max_tokens"] - self.lost, 2):
            ids = list(range(start, min(start + 2, body["max_tokens"])))
            await self._send(response, {"choices": [{"text": "a", "token_ids": ids}], "usage": None})
            await asyncio.sleep(0.002)
        await self._send(response, {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        await response.write(b"data: [DONE]\n\n")
        self._now -= 1
        return response

    async def _send(self, response: web.StreamResponse, message: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(message).encode() + b"\n\n"
        await response.write(data[:10])
        await response.write(data[10:])


@pytest.fixture
def server() -> Iterator[Streaming]:
    streaming, ready = Streaming(), threading.Event()
    loop, done = asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", streaming.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        streaming.port = runner.addresses[0][1]
        ready.set()
        await done.wait()
        await runner.cleanup()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(30)
    yield streaming
    loop.call_soon_threadsafe(done.set)
    thread.join(30)


def test_clients_ask_as_many_requests_at_once_as_there_are_clients(server):
    ask = Ask(url=server.url, num_tokens=7)
    prompts = [[number] for number in range(12)]
    streams = run_load(ask, Load(concurrency=4), prompts, per_client=3)
    assert server.most_at_once == 4
    assert sorted(body["prompt"] for body in server.bodies) == prompts
    assert [(stream.num_tokens, stream.token_ids) for stream in streams] == [(7, list(range(7)))] * 12
    assert all(stream.began < stream.arrivals[0] <= stream.ended for stream in streams)


def test_a_request_says_what_the_cell_asks_for(server):
    ask_one(Ask(url=server.url, num_tokens=4, tier="balanced", temperature=0.8, seed=5, salt="a row/2, 3 requests/s"), [1, 2])
    ask_one(Ask(url=server.url, num_tokens=4), [1, 2])
    first, second = server.bodies
    assert first["vllm_xargs"] == {"sedac_tier": "balanced"}
    assert (first["temperature"], first["seed"], first["ignore_eos"]) == (0.8, 5, True)
    assert re.fullmatch("[0-9a-f]{64}", first["cache_salt"]), "vLLM takes neither / nor more than 128 characters"
    assert first["stream_options"] == {"include_usage": True}
    assert second.keys() & {"vllm_xargs", "seed", "cache_salt"} == set()


def test_requests_at_a_rate_come_whoever_waits(server):
    streams = run_load(Ask(url=server.url, num_tokens=2), Load(rate=200.0), [[1]], seconds=0.2, seed=1)
    assert len(streams) > 10
    assert len(run_load(Ask(url=server.url, num_tokens=2), Load(rate=1000.0), [[1]], seconds=1e-9, seed=1)) == 1


def test_clients_go_on_for_a_time(server):
    streams = run_load(Ask(url=server.url, num_tokens=2), Load(concurrency=2), [[1]], seconds=0.3)
    assert len(streams) >= 4


def test_a_refusal_is_told_in_the_servers_words(server):
    server.status = 400
    with pytest.raises(BenchmarkFailed, match="answered 400 to a request of tier 'none': no such tier"):
        run_load(Ask(url=server.url, num_tokens=2, tier="none"), Load(concurrency=3), [[1]])


def test_an_answer_that_lacks_tokens_is_no_figure(server):
    server.lost = 4
    with pytest.raises(BenchmarkFailed, match="an answer had 2 tokens, its usage says 6"):
        ask_one(Ask(url=server.url, num_tokens=6), [1])


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(BenchmarkFailed, match=r"http://127\.0\.0\.1:9 failed"):
        ask_one(Ask(url="http://127.0.0.1:9", num_tokens=1), [1])


def test_a_server_that_breaks_off_is_told_in_its_words():
    pieces = [(1.0, b'data: {"choices": [{"token_ids": [1]}]}\n\n'), (2.0, b'data: {"error": {"message": "out of memory"}}\n\n')]
    with pytest.raises(BenchmarkFailed, match="out of memory"):
        read_stream(0.0, pieces)


def test_there_are_enough_prompts_for_a_cell():
    assert count_prompts(Load(concurrency=4), 3, 0.0) == 12
    assert count_prompts(Load(concurrency=4), 3, 5.0) == 20
    assert count_prompts(Load(rate=0.01), 3, 5.0) == 1
