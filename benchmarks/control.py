"""What the control plane promises under load, faults and in fleets, as figures.

    python benchmarks/control.py fleet      8 agents and 256 simulated engines: seconds until all have acknowledged a change
    python benchmarks/control.py load       1,000 policy changes and 100 probe-set swaps under closed-loop load of one engine
    python benchmarks/control.py away       the same load while the control service is killed, frozen and replaced by garbage

Each prints a table and writes its part of benchmarks/results/control.json. `load` and `away` start the real `sedac serve` on the demo
model, without drafts. Absolute times of a shared machine are noise; ratios are taken between windows of one run that lie beside each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from sedac.client.client import ControlClient  # noqa: E402
from sedac.contract import wire  # noqa: E402
from sedac.contract.v1 import control_pb2  # noqa: E402
from sedac.errors import NotSynced, SedacError  # noqa: E402
from sedac.policy.model import Checkpoint, Policy  # noqa: E402
from traffic import Memory, Traffic, find_percentile, find_processes, read_apply_percentiles  # noqa: E402

from tests.control.processes import ControlProcess  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)
console = Console()
Seed = Annotated[int, typer.Option(help="Of the random choices: who crashes, which window comes first.")]


def _save(part: str, figures: dict[str, Any]) -> None:
    path = RESULTS / "control.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[part] = {"machine": f"{platform.machine()}, {psutil.cpu_count()} cores", **figures}
    path.write_text(json.dumps(known, indent=2) + "\n")
    console.print(f"written: {path.relative_to(ROOT)}, part {part!r}")


def _show(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column.replace("_", " "), justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    console.print(table)


@app.command()
def fleet(
    simulated: Annotated[int, typer.Option(min=1, help="Engines that speak the protocol and acknowledge at once; one connection each.")] = 256,
    agents: Annotated[int, typer.Option(min=0, help="Real agents; their calls to the engine are recorded.")] = 8,
    changes: Annotated[int, typer.Option(min=1, help="Policy changes, one after the other.")] = 100,
    churn: Annotated[int, typer.Option(min=0, help="Engines that crash before each change; half come back during it, half after it.")] = 8,
    seed: Seed = 0,
) -> None:
    """Measure the time until a whole fleet has acknowledged a change, with crashes and joins in between.

    `applied` ends when the last engine has the policy, `shown` when an operator's WatchEngines says SYNCED for all, `joined` is the
    time from starting an engine again to SYNCED. All engines live in one process, which takes half the machine: an upper limit.
    """
    with tempfile.TemporaryDirectory() as directory:
        service = ControlProcess(Path(directory) / "control.sqlite3")
        try:
            figures = asyncio.run(_run_fleet(service, simulated, agents, changes, churn, random.Random(seed)))
        finally:
            service.kill()
    rows = [[name, *(figures[f"{name}_seconds"][p] for p in ("p50", "p99", "max"))] for name in ("applied", "shown", "joined")]
    _show(f"{agents} agents and {simulated} simulated engines, {changes} changes, {churn} crashes and joins each", ["s", "p50", "p99", "max"], rows)
    console.print(f"control service: {figures['control_cpu_seconds_per_change']:.3f} s of CPU a change, {figures['control_rss_mib']:.0f} MiB")
    _save("fleet", figures)


async def _run_fleet(service: ControlProcess, simulated: int, agents: int, changes: int, churn: int, numbers: random.Random) -> dict[str, Any]:
    from tests.control.simulated import Fleet

    crowd = Fleet(service.address, num_simulated=simulated, num_agents=agents)
    await crowd.start()
    process = psutil.Process(service.process.pid)
    seconds: dict[str, list[float]] = {"applied": [], "shown": [], "joined": []}
    cpu = sum(process.cpu_times()[:2])
    for _ in track(range(changes), description="changes", console=console):
        gone = crowd.choose(min(churn, len(crowd.live) - 1), numbers)
        await crowd.crash(gone)
        started = time.monotonic()
        changing = asyncio.create_task(crowd.change())
        stayed = set(crowd.live)
        crowd.restart(gone[::2])
        revision = await changing
        await crowd.wait_until_acked(revision)
        seconds["shown"].append(time.monotonic() - started)
        seconds["applied"].append(max(engine.times[revision] for engine in stayed) - started)
        started = time.monotonic()
        crowd.restart(gone[1::2])
        await crowd.wait_until_acked(revision)
        seconds["joined"].append(time.monotonic() - started)
    cpu = sum(process.cpu_times()[:2]) - cpu
    assert all(agent.revision == changes + 1 for agent in crowd.agents), "an agent was left behind"
    memory = process.memory_info().rss / 2**20
    await crowd.stop()
    return {
        "simulated": simulated, "agents": agents, "changes": changes, "churn": churn,
        **{f"{name}_seconds": _summarize(values) for name, values in seconds.items()},
        "control_cpu_seconds_per_change": round(cpu / changes, 4), "control_rss_mib": round(memory, 1),
    }  # fmt: skip


def _summarize(values: list[float]) -> dict[str, float]:
    return {name: round(find_percentile(values, share), 4) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def _make_sets(directory: Path, count: int) -> list[Path]:
    """Write the demo's probe set `count` times, each with its weights a little off, without levels of its own."""
    import dataclasses

    import torch
    from sedac.probe import artifact

    demo = artifact.load(ROOT / "probes" / "sedac_demo" / "probe-set")
    made = []
    for number in range(count):
        torch.manual_seed(number)
        for probe in demo.probes.values():
            with torch.no_grad():
                for weight in probe.parameters():
                    weight.mul_(1 + 0.001 * torch.randn_like(weight))
        manifest = dataclasses.replace(demo.manifest, name=f"swap-{number}", levels=(), tiers=(), intermediate_size=0, activation="")
        made.append(directory / manifest.name)
        artifact.save(made[-1], manifest, demo.probes)
    return made


class _Watcher:
    """Follows the one engine by WatchEngines, in a thread of its own until the client closes; asking again and again would load both."""

    def __init__(self, client: ControlClient) -> None:
        self._client, self._changed, self._revision = client, threading.Condition(), 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with contextlib.suppress(SedacError):
            for answer in self._client.watch_engines():
                with self._changed:
                    self._revision = max([e.active_revision for e in answer.engines if e.state == control_pb2.ENGINE_STATE_SYNCED], default=0)
                    self._changed.notify_all()

    def wait_until_synced(self, revision: int, timeout_seconds: float) -> None:
        """Return once the engine runs `revision` or a newer one."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._revision >= revision, timeout_seconds):
                raise NotSynced(f"revision {revision} is not in force after {timeout_seconds:g} s")


class _Changer:
    """Makes changes one after the other; each is in force in the engine, or replaced, before the next."""

    def __init__(self, client: ControlClient, sets: list[Path], num_changes: int) -> None:
        self._client, self._sets, self._watcher = client, sets, _Watcher(client)
        self._every = num_changes // len(sets) if sets else num_changes + 1
        self._policy: Policy = wire.policy_from_proto(client.get_policy())
        self.num_changes = self.num_swaps = 0
        self.seconds: list[float] = []
        """The time of each change, from asking for it until the operator saw it in force."""
        self.swap_seconds: list[float] = []

    def change(self) -> None:
        """Turn a threshold; with every so many changes upload and name another probe set, and delete the last but one."""
        import dataclasses

        started, self.num_changes = time.monotonic(), self.num_changes + 1
        is_swap = self.num_changes % self._every == 0 and self.num_swaps < len(self._sets)
        policy = self._policy
        if is_swap:
            self._client.upload_probe_set(self._sets[self.num_swaps])
            policy, self.num_swaps = dataclasses.replace(policy, probe_set=self._sets[self.num_swaps].name), self.num_swaps + 1
        scale = 0.9 + 0.2 * (self.num_changes % 7) / 6
        self._policy = policy
        turned = tuple(Checkpoint(**{**vars(c), "threshold": c.threshold * scale}) for c in policy.checkpoints)
        revision = self._client.update_policy(dataclasses.replace(policy, checkpoints=turned, certificate=None)).revision
        self._watcher.wait_until_synced(revision, 60)
        (self.swap_seconds if is_swap else self.seconds).append(time.monotonic() - started)
        if is_swap and self.num_swaps > 2:
            self._client.delete_probe_set(self._sets[self.num_swaps - 3].name)

    def run_until(self, end: float, target: int) -> None:
        """Make changes at an even pace, so that `target` of them are made by `end` on the monotonic clock."""
        missing = target - self.num_changes
        begin, first = time.monotonic(), self.num_changes
        while self.num_changes < target and time.monotonic() < end:
            self.change()
            due = begin + (end - begin) * (self.num_changes - first) / missing
            time.sleep(max(0.0, due - time.monotonic()))
        time.sleep(max(0.0, end - time.monotonic()))


@app.command()
def load(
    changes: Annotated[int, typer.Option(min=1, help="Policy changes, each acknowledged by the engine before the next.")] = 1000,
    swaps: Annotated[int, typer.Option(min=0, help="Of these, changes that name a probe set uploaded just before.")] = 100,
    streams: Annotated[int, typer.Option(min=1, help="Clients that ask again as soon as they have their answer.")] = 8,
    pairs: Annotated[int, typer.Option(min=1, help="Windows with changes, each beside one without.")] = 10,
    window_seconds: Annotated[float, typer.Option(min=1, help="Length of a window.")] = 40.0,
    pin: Annotated[bool, typer.Option(help="Compute on the first core alone, control service and clients on the others.")] = True,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 128,
    seed: Seed = 0,
) -> None:
    """Change policies and swap probe sets under load: failed requests, torn steps, memory, throughput, time to apply.

    Windows with and without changes alternate in random order; the throughput ratio is with / without, the median over the pairs.
    """
    from tests.e2e.conftest import start, stop

    numbers = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        sets = _make_sets(directory / "sets", swaps)
        served = start(directory, "--draft", "none", "--dtype", "float32", **({"VLLM_CPU_OMP_THREADS_BIND": "0"} if pin else {}))
        try:
            if pin:
                for thread in (*psutil.Process().threads(), *served.find_control().threads()):
                    os.sched_setaffinity(thread.id, range(1, psutil.cpu_count()))
            with ControlClient(served.control_address, author="benchmark") as client:
                traffic = Traffic(served.url, num_streams=streams, max_tokens=max_tokens)
                memory = None
                try:
                    changer = _Changer(client, sets, changes)
                    time.sleep(8)  # kernels, caches and pools warm up
                    memory = Memory(find_processes(psutil.Process(served.process.pid)))
                    ratios, done = [], []
                    for pair in track(range(pairs), description="pairs of windows", console=console):
                        rates = {}
                        for kind in numbers.sample(("with", "without"), 2):
                            begin = time.monotonic()
                            end = begin + window_seconds
                            if kind == "with":
                                changer.run_until(end, changes * (pair + 1) // pairs)
                            else:
                                time.sleep(window_seconds)
                            now = time.monotonic()
                            rates[kind] = sum(a.num_tokens for a in traffic.find_answers(begin, now)) / (now - begin)
                        done.append(rates)
                        ratios.append(rates["with"] / rates["without"])
                    while changer.num_changes < changes:  # what a slow machine did not get done within the windows
                        changer.change()
                finally:
                    traffic.close()
                    if memory:
                        memory.close()
            samples = served.read_metrics()
            apply_p50, apply_p99 = read_apply_percentiles(served.url, (0.5, 0.99))
        finally:
            stop(served)
    failed = [a.problem for a in traffic.answers if a.problem]
    acked = samples["sedac_policy_updates_total{ack}"]
    figures = {
        "pinned": pin, "changes_per_second": round(changes / pairs / window_seconds, 2),
        "changes": changer.num_changes, "swaps": changer.num_swaps, "applied_by_engine": int(acked), "streams": streams,
        "requests": len(traffic.answers), "failed_requests": len(failed), "problems": failed[:5],
        "torn_steps": int(samples["sedac_torn_steps_total"]),
        "throughput_ratio": round(statistics.median(ratios), 4), "throughput_ratios": [round(r, 3) for r in ratios],
        "tokens_per_second_without": round(statistics.median(r["without"] for r in done), 1),
        "apply_seconds": {"p50": round(apply_p50, 5), "p99": round(apply_p99, 5)},
        "change_to_synced_seconds": _summarize(changer.seconds), "swap_to_synced_seconds": _summarize(changer.swap_seconds),
        "rss_mib": {name: _describe_memory([row[name] for row in memory.rows if name in row]) for name in memory.processes},
    }  # fmt: skip
    rows = [[name, *(m[k] for k in ("first tenth", "middle", "last tenth", "max"))] for name, m in figures["rss_mib"].items()]
    _show("resident memory, MiB", ["process", "first tenth", "middle", "last tenth", "max"], rows)
    latencies = [["apply in the engine", figures["apply_seconds"]], ["change, upload excluded, to SYNCED", figures["change_to_synced_seconds"]],
                 ["upload and swap to SYNCED", figures["swap_to_synced_seconds"]]]  # fmt: skip
    _show("seconds", ["", "p50", "p99"], [[name, value["p50"], value["p99"]] for name, value in latencies])
    facts = ("changes", "swaps", "applied_by_engine", "requests", "failed_requests", "torn_steps", "throughput_ratio")
    _show(f"{streams} streams of closed-loop load", ["", "figure"], [[name.replace("_", " "), figures[name]] for name in facts])
    _save("load", figures)
    _plot_memory(memory)


def _describe_memory(values: list[float]) -> dict[str, float]:
    tenth = max(1, len(values) // 10)
    parts = {"first tenth": values[:tenth], "middle": values[len(values) // 2 - tenth // 2 :][:tenth], "last tenth": values[-tenth:]}
    return {name: round(statistics.median(part), 1) for name, part in parts.items()} | {"max": max(values)}


def _plot_memory(memory: Memory) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name in memory.processes:
        axes.plot([row["seconds"] for row in memory.rows], [row.get(name, math.nan) for row in memory.rows], label=name)
    axes.set(xlabel="seconds under load, with changes and swaps", ylabel="resident memory, MiB", ylim=(0, None))
    axes.legend()
    figure.savefig(RESULTS / "control-memory.png", dpi=120)
    console.print("written: benchmarks/results/control-memory.png")


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
    from tests.control.proxies import impersonating

    bad = wire.policy_to_proto(Policy(enabled=True, checkpoints=(Checkpoint(layer=2, threshold=math.nan),)), revision=10**6)
    messages = [control_pb2.PolicyPush(nonce="n", policy=bad).SerializeToString(), b"\xff" * 100]
    service.kill()
    with impersonating(int(service.address.rpartition(":")[2]), messages):
        yield
    service.start()


@app.command()
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
    from tests.e2e.conftest import find_free_port, start, stop

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
    _show(f"latency beside quiet windows, {streams} streams, faults of {fault_seconds:g} s", columns, [[row[c] for c in columns] for row in rows])
    console.print(f"failed requests: {len(failed)} of {len(traffic.answers)}")
    _save("away", {"streams": streams, "fault_seconds": fault_seconds, "requests": len(traffic.answers), "failed_requests": len(failed),
                   "problems": failed[:5], "faults": rows})  # fmt: skip


def _measure(traffic: Traffic, seconds: float) -> list[float]:
    begin = time.monotonic()
    time.sleep(seconds)
    return [answer.seconds for answer in traffic.find_answers(begin, time.monotonic()) if not answer.problem]


def _ask_engine(url: str) -> dict[str, Any]:
    import httpx

    return httpx.get(f"{url}/sedac/status", timeout=30).raise_for_status().json()


if __name__ == "__main__":
    app()
