"""The control service taken away under load: killed, frozen, answering garbage."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.contract.v1 import control_pb2
from sedac.policy.model import Checkpoint, Policy

from benchmarks.control.results import console, save, show
from benchmarks.control.traffic import Traffic, find_percentile
from testing.control.processes import ControlProcess
from testing.control.proxies import impersonating
from testing.served import find_free_port, start, stop


@contextlib.contextmanager
def _killed(service: ControlProcess) -> Iterator[None]:
    service.kill()
    yield
    service.start()


@contextlib.contextmanager
def _frozen(service: ControlProcess) -> Iterator[None]:
    service.freeze()
    yield
    service.thaw()


@contextlib.contextmanager
def _garbled(service: ControlProcess) -> Iterator[None]:
    """In its place one that pushes thresholds that are no numbers, then bytes that are no message, and hangs up."""
    bad = wire.policy_to_proto(Policy(enabled=True, checkpoints=(Checkpoint(layer=2, threshold=math.nan),)), revision=10**6)
    messages = [control_pb2.PolicyPush(nonce="n", policy=bad).SerializeToString(), b"\xff" * 100]
    service.kill()
    with impersonating(int(service.address.rpartition(":")[2]), messages):
        yield
    service.start()


def away(
    streams: Annotated[int, typer.Option(min=1, help="Clients that ask again as soon as they have their answer.")] = 4,
    fault_seconds: Annotated[float, typer.Option(min=1, help="How long each fault lasts.")] = 60.0,
    quiet_seconds: Annotated[float, typer.Option(min=1, help="How long all is well before and after each.")] = 30.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 16,
) -> None:
    """Take the control service away under load: killed, frozen (connections open, nothing comes), answering garbage.

    The latency of a window is held against the quiet windows before and after it. The engine must say STALE (or NACKED, of garbage)
    while the fault lasts, keep its revision, and be SYNCED by itself afterwards with the change that was made meanwhile or after it.
    """
    faults = {"killed": _killed, "frozen": _frozen, "garbage": _garbled}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        service = ControlProcess(directory / "control-away.sqlite3", SEDAC_CONTROL_PORT=str(find_free_port()))
        served = start(directory, "--draft", "none", "--dtype", "float32", "--control", service.address)
        traffic = Traffic(served.url, num_streams=streams, max_tokens=max_tokens)
        try:
            time.sleep(8)
            quiet = [_measure(traffic, quiet_seconds)]
            for what, fault in faults.items():
                console.print(f"{what} for {fault_seconds:g} s")
                revision = _ask_engine(served.url)["revision"]
                with fault(service):
                    during = _measure(traffic, fault_seconds)
                    told = _ask_engine(served.url)
                back = time.monotonic()
                while _ask_engine(served.url)["state"] != "SYNCED":
                    time.sleep(0.05)
                synced = time.monotonic() - back
                with ControlClient(service.address) as client:
                    made = client.update_policy(Policy(enabled=True), fields=["enabled"]).revision
                    client.wait_until_synced(made, 60)
                quiet.append(_measure(traffic, quiet_seconds))
                rows.append({"fault": what, "during": during, "state": told["state"], "kept": told["revision"] == revision, "synced_seconds": synced})
        finally:
            traffic.close()
            stop(served)
            service.kill()
    failed = [a.problem for a in traffic.answers if a.problem]
    for row, before, after in zip(rows, quiet, quiet[1:], strict=False):
        beside = before + after
        for figure, share in (("p50", 0.5), ("p99", 0.99)):
            row[f"{figure}_seconds"] = round(find_percentile(row["during"], share), 4)
            row[f"{figure}_ratio"] = round(find_percentile(row["during"], share) / find_percentile(beside, share), 3)
        row["requests"], row["synced_seconds"] = len(row.pop("during")), round(row["synced_seconds"], 2)
    columns = ["fault", "requests", "p50_ratio", "p99_ratio", "p99_seconds", "state", "kept", "synced_seconds"]
    show(f"latency beside quiet windows, {streams} streams, faults of {fault_seconds:g} s", columns, [[row[c] for c in columns] for row in rows])
    console.print(f"failed requests: {len(failed)} of {len(traffic.answers)}")
    save("away", {"streams": streams, "fault_seconds": fault_seconds, "requests": len(traffic.answers), "failed_requests": len(failed),
                   "problems": failed[:5], "faults": rows})  # fmt: skip


def _measure(traffic: Traffic, seconds: float) -> list[float]:
    begin = time.monotonic()
    time.sleep(seconds)
    return [answer.seconds for answer in traffic.find_answers(begin, time.monotonic()) if not answer.problem]


def _ask_engine(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}/sedac/status", timeout=30).raise_for_status().json()
