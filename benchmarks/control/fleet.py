"""A whole fleet: seconds until everybody has acknowledged a change, with crashes and joins in between."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.progress import track

from benchmarks.control.results import Seed, console, save, show, summarize
from testing.control.processes import ControlProcess
from testing.control.simulated import Fleet


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
    show(f"{agents} agents and {simulated} simulated engines, {changes} changes, {churn} crashes and joins each", ["s", "p50", "p99", "max"], rows)
    console.print(f"control service: {figures['control_cpu_seconds_per_change']:.3f} s of CPU a change, {figures['control_rss_mib']:.0f} MiB")
    save("fleet", figures)


async def _run_fleet(service: ControlProcess, simulated: int, agents: int, changes: int, churn: int, numbers: random.Random) -> dict[str, Any]:
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
        **{f"{name}_seconds": summarize(values) for name, values in seconds.items()},
        "control_cpu_seconds_per_change": round(cpu / changes, 4), "control_rss_mib": round(memory, 1),
    }  # fmt: skip
