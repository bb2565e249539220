"""What benchmarks under load share: closed-loop requests against `sedac serve`, and the memory of its processes over time."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import psutil

_PROMPTS = ("def read(self", "class Reader:\n    def ", "import os\n\ndef main(", "for name in sorted(", "    return self._", "if not isinstance(")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One finished request."""

    finished: float
    """When it ended, on the monotonic clock."""
    seconds: float
    num_tokens: int
    problem: str
    """What went wrong. Empty if it was answered whole."""


class Traffic:
    """`num_streams` clients, each of which asks again as soon as it has its answer; runs in a thread of its own until closed."""

    def __init__(self, url: str, *, num_streams: int, max_tokens: int) -> None:
        self.answers: list[Answer] = []
        self._url, self._num_streams, self._max_tokens = url, num_streams, max_tokens
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    def close(self) -> None:
        """Stop asking; returns when the last answers are there."""
        self._stopping.set()
        self._thread.join()

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=self._num_streams)
        async with httpx.AsyncClient(base_url=self._url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._ask_again(client, stream) for stream in range(self._num_streams)))

    async def _ask_again(self, client: httpx.AsyncClient, stream: int) -> None:
        body = {"model": "sedac-demo", "max_tokens": self._max_tokens, "temperature": 0, "ignore_eos": True}
        number = stream
        while not self._stopping.is_set():
            number, started, num_tokens, problem = number + 1, time.monotonic(), 0, ""
            try:
                answer = await client.post("/v1/completions", json={**body, "prompt": _PROMPTS[number % len(_PROMPTS)]})
                if answer.status_code == 200:
                    num_tokens = answer.json()["usage"]["completion_tokens"]
                    problem = "" if num_tokens == self._max_tokens else f"{num_tokens} tokens instead of {self._max_tokens}"
                else:
                    problem = f"HTTP {answer.status_code}: {answer.text[:200]}"
            except httpx.HTTPError as error:
                problem = repr(error)
            now = time.monotonic()
            self.answers.append(Answer(finished=now, seconds=now - started, num_tokens=num_tokens, problem=problem))
            if problem:
                await asyncio.sleep(0.2)

    def find_answers(self, begin: float, end: float) -> list[Answer]:
        """The requests that finished in a window of the monotonic clock."""
        return [answer for answer in list(self.answers) if begin <= answer.finished < end]


class Memory:
    """Resident memory by process, read once a second until closed; what restarts under the same name goes on in the same row."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self.processes = processes
        self.started = time.monotonic()
        self.rows: list[dict[str, float]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def close(self) -> None:
        """Stop reading."""
        self._stopping.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopping.wait(1.0):
            row = {"seconds": round(time.monotonic() - self.started, 1)}
            for name, process in list(self.processes.items()):
                try:
                    row[name] = round(process.memory_info().rss / 2**20, 1)
                except psutil.NoSuchProcess:
                    row[name] = math.nan
            self.rows.append(row)


def find_percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed; NaN of none."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, math.ceil(share * len(ranked)) - 1)] if ranked else math.nan


def read_apply_percentiles(url: str, shares: Sequence[float]) -> list[float]:
    """Percentiles of `sedac_policy_apply_seconds` on /metrics, in seconds, interpolated within a bucket as Prometheus does."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    buckets = []
    for line in lines:
        if line.startswith("sedac_policy_apply_seconds_bucket{"):
            limit = line.split('le="')[1].split('"')[0]
            buckets.append((math.inf if limit == "+Inf" else float(limit), float(line.rsplit(" ", 1)[1])))
    buckets.sort()
    found = []
    for share in shares:
        wanted, low, below = share * buckets[-1][1], 0.0, 0.0
        for limit, count in buckets:
            if count >= wanted and count > below:
                found.append(low if math.isinf(limit) else low + (limit - low) * (wanted - below) / (count - below))
                break
            low, below = limit, count
    return found


def find_processes(root: psutil.Process) -> dict[str, psutil.Process]:
    """The processes of one `sedac serve` that do the work: vLLM's API server and its engine core."""
    found = {}
    for process in root.children(recursive=True):
        try:
            name, command = process.name(), " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if "vllm.entrypoints.openai.api_server" in command:
            found["api server"] = process
        elif "EngineCore" in name or "EngineCore" in command:
            found["engine"] = process
        elif command.endswith("sedac.app.cli control"):
            found["control"] = process
    return found
