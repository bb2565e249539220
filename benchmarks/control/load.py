"""Changes and swaps under load: failed requests, torn steps, memory, throughput, seconds until a change is in force."""

from __future__ import annotations

import math
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import matplotlib
import psutil
import typer
from rich.progress import track
from sedac.client.client import ControlClient

from benchmarks.control.changes import Changer, make_sets
from benchmarks.control.results import RESULTS, Seed, console, save, show, summarize
from benchmarks.control.traffic import Memory, Traffic, find_processes, read_apply_percentiles
from testing.served import start, stop


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
    numbers = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        sets = make_sets(directory / "sets", swaps)
        served = start(directory, "--draft", "none", "--dtype", "float32", **({"VLLM_CPU_OMP_THREADS_BIND": "0"} if pin else {}))
        try:
            if pin:
                for thread in (*psutil.Process().threads(), *served.find_control().threads()):
                    os.sched_setaffinity(thread.id, range(1, psutil.cpu_count()))
            with ControlClient(served.control_address, author="benchmark") as client:
                traffic = Traffic(served.url, num_streams=streams, max_tokens=max_tokens)
                memory = None
                try:
                    changer = Changer(client, sets, changes)
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
        "change_to_synced_seconds": summarize(changer.seconds), "swap_to_synced_seconds": summarize(changer.swap_seconds),
        "rss_mib": {name: _describe_memory([row[name] for row in memory.rows if name in row]) for name in memory.processes},
    }  # fmt: skip
    rows = [[name, *(m[k] for k in ("first tenth", "middle", "last tenth", "max"))] for name, m in figures["rss_mib"].items()]
    show("resident memory, MiB", ["process", "first tenth", "middle", "last tenth", "max"], rows)
    latencies = [["apply in the engine", figures["apply_seconds"]], ["change, upload excluded, to SYNCED", figures["change_to_synced_seconds"]],
                 ["upload and swap to SYNCED", figures["swap_to_synced_seconds"]]]  # fmt: skip
    show("seconds", ["", "p50", "p99"], [[name, value["p50"], value["p99"]] for name, value in latencies])
    facts = ("changes", "swaps", "applied_by_engine", "requests", "failed_requests", "torn_steps", "throughput_ratio")
    show(f"{streams} streams of closed-loop load", ["", "figure"], [[name.replace("_", " "), figures[name]] for name in facts])
    save("load", figures)
    _plot_memory(memory)


def _describe_memory(values: list[float]) -> dict[str, float]:
    tenth = max(1, len(values) // 10)
    parts = {"first tenth": values[:tenth], "middle": values[len(values) // 2 - tenth // 2 :][:tenth], "last tenth": values[-tenth:]}
    return {name: round(statistics.median(part), 1) for name, part in parts.items()} | {"max": max(values)}


def _plot_memory(memory: Memory) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name in memory.processes:
        axes.plot([row["seconds"] for row in memory.rows], [row.get(name, math.nan) for row in memory.rows], label=name)
    axes.set(xlabel="seconds under load, with changes and swaps", ylabel="resident memory, MiB", ylim=(0, None))
    axes.legend()
    figure.savefig(RESULTS / "control-memory.png", dpi=120)
    console.print("written: benchmarks/results/control-memory.png")
