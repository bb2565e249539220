"""Requests over HTTP, and what came back when.

While a cell is measured the client only notes when each piece of an answer arrived; it reads them when all is over, for it shares the
machine with the server.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sedac.bench.extras import need
from sedac.bench.matrix import DEFAULT_TIER, Load
from sedac.bench.plans import SERVED_NAME
from sedac.errors import BenchmarkFailed
from sedac.policy.request_keys import TIER_KEY

_TIMEOUT_SECONDS = 900.0


@dataclass(kw_only=True)
class Stream:
    """One answer as it came."""

    began: float
    """When the request was sent, in seconds of a monotonic clock."""
    arrivals: list[float] = field(default_factory=list)
    """When each piece with tokens arrived, by the same clock."""
    tokens: list[int] = field(default_factory=list)
    """Tokens of each piece."""
    token_ids: list[int] = field(default_factory=list)
    """Ids of all tokens."""
    num_tokens: int = 0
    """Tokens of the answer, as the server counts them in `usage`."""

    @property
    def ended(self) -> float:
        """When the last token arrived."""
        return self.arrivals[-1]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What every request of a cell has in common."""

    url: str
    tier: str = DEFAULT_TIER
    num_tokens: int
    temperature: float = 0.0
    seed: int = 0
    salt: str = ""
    """Cache salt. Requests of different salts share no cached prompt."""

    def make_body(self, prompt: Sequence[int], number: int = 0) -> dict[str, Any]:
        """Return the request's body."""
        body: dict[str, Any] = {
            "model": SERVED_NAME,
            "prompt": list(prompt),
            "max_tokens": self.num_tokens,
            "ignore_eos": True,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if self.temperature:
            body["seed"] = self.seed + number
        if self.salt:
            body["cache_salt"] = hashlib.sha256(self.salt.encode()).hexdigest()  # vLLM refuses some characters, and names of rows are anything
        if self.tier != DEFAULT_TIER:
            body["vllm_xargs"] = {TIER_KEY: self.tier}
        return body


def read_stream(began: float, pieces: Sequence[tuple[float, bytes]]) -> Stream:
    """Read an answer of server-sent events; `pieces` are when bytes arrived, and the bytes.

    Raises:
        BenchmarkFailed: the server broke off, or counted other tokens than it sent.
    """
    stream, rest = Stream(began=began), b""
    for arrived, data in pieces:
        *events, rest = (rest + data).split(b"\n\n")
        num_tokens = 0
        for event in events:
            line = event.strip().removeprefix(b"data: ")
            if not line.startswith(b"{"):
                continue
            message = json.loads(line)
            if "error" in message:
                raise BenchmarkFailed(f"the server broke off: {message['error']}")
            for choice in message.get("choices", ()):
                ids = choice.get("token_ids") or ()
                num_tokens += len(ids)
                stream.token_ids += ids
            if message.get("usage"):
                stream.num_tokens = message["usage"]["completion_tokens"]
        if num_tokens:
            stream.arrivals.append(arrived)
            stream.tokens.append(num_tokens)
    if not stream.arrivals or sum(stream.tokens) != stream.num_tokens:
        raise BenchmarkFailed(f"an answer had {sum(stream.tokens)} tokens, its usage says {stream.num_tokens}; the stream broke off")
    return stream


async def _send(session: Any, ask: Ask, prompt: Sequence[int], number: int) -> tuple[float, list[tuple[float, bytes]]]:
    body = json.dumps(ask.make_body(prompt, number)).encode()
    pieces = []
    began = time.monotonic()
    try:
        async with session.post(f"{ask.url}/v1/completions", data=body, headers={"Content-Type": "application/json"}) as answer:
            if answer.status != 200:
                raise BenchmarkFailed(f"the server answered {answer.status} to a request of tier {ask.tier!r}: {(await answer.text())[:500]}")
            async for data in answer.content.iter_any():
                pieces.append((time.monotonic(), data))
    except (need("aiohttp").ClientError, OSError) as error:
        raise BenchmarkFailed(f"a request to {ask.url} failed: {error!r}") from error
    return began, pieces


async def _run(ask: Ask, load: Load, prompts: Sequence[Sequence[int]], per_client: int, seconds: float, seed: int) -> list[Stream]:
    aiohttp = need("aiohttp")
    numbers: Iterator[int] = iter(range(1 << 30))
    done: list[tuple[float, list[tuple[float, bytes]]]] = []
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def send(number: int) -> None:
            done.append(await _send(session, ask, prompts[number % len(prompts)], number))

        async def be_client() -> None:
            """Send one request after the other, as many as asked for or until the time is over."""
            end, count = time.monotonic() + seconds, 0
            while time.monotonic() < end if seconds else count < per_client:
                count += 1
                await send(next(numbers))

        async def be_public() -> None:
            """Send requests at random times of the wanted rate, whether earlier ones are answered or not."""
            pauses, waited = random.Random(seed), 0.0
            async with asyncio.TaskGroup() as public:
                while not waited or waited < seconds:
                    pause = pauses.expovariate(load.rate)
                    await asyncio.sleep(pause)
                    waited += pause
                    public.create_task(send(next(numbers)))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(load.concurrency):
                    group.create_task(be_client())
                if load.rate:
                    group.create_task(be_public())
        except BaseExceptionGroup as errors:
            raise _find_first(errors) from None
    return [read_stream(began, pieces) for began, pieces in done]


def _find_first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def run_load(ask: Ask, load: Load, prompts: Sequence[Sequence[int]], *, per_client: int = 1, seconds: float = 0.0, seed: int = 0) -> list[Stream]:
    """Send requests as a load says and return the answers, in no order.

    Clients send `per_client` requests each, or begin new ones for `seconds`. At a rate, requests come for `seconds`, at least one.

    Raises:
        BenchmarkFailed: the server refused one, or broke off.
    """
    return asyncio.run(_run(ask, load, prompts, per_client, seconds, seed))


def ask_one(ask: Ask, prompt: Sequence[int]) -> Stream:
    """Send one request and return its answer.

    Raises:
        BenchmarkFailed: the server refused it, or broke off.
    """
    return run_load(ask, Load(concurrency=1), [prompt])[0]


def count_prompts(load: Load, per_client: int, seconds: float) -> int:
    """Return how many prompts a cell takes; where a time decides, as many as it is likely to."""
    if load.concurrency:
        return load.concurrency * (per_client if not seconds else max(2, round(seconds)))
    return max(1, round(2 * load.rate * seconds))
