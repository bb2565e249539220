"""The command `demo`: the whole workshop on the demo model, one step after the other."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from sedac_probes.commands.options import DEMO


def demo(
    work: Annotated[Path, typer.Option(help="Work directory; a run that was stopped goes on with the step that it was in.")] = Path(
        "build/demo-probes"
    ),
    model: Annotated[str, typer.Option(help="Model directory.")] = str(DEMO / "model"),
    name: Annotated[str, typer.Option(help="Name of the probe set.")] = "demo",
    samples: Annotated[int, typer.Option(help="Documents to collect from; half as many calibrate.")] = 240,
    requests: Annotated[int, typer.Option(help="Requests to certify with.")] = 500,
    eps: Annotated[float, typer.Option(help="The bound to certify: mean share of mismatched tokens at most.")] = 0.05,
) -> None:
    """Run the workshop from model to certified policy: collect, train, calibrate, validate, compare, certify, report.

    Every step is the command of its name, in a process of its own, and is printed so that it can be run alone. WORK/policy.json is for
    `sedac ctl policy apply`, on an engine that serves WORK/probe-set; WORK/report.html shows the run.
    """
    streams, probe_set = work / "streams", work / "probe-set"
    common = ["--model", model, "--probe-set", str(probe_set)]
    steps: list[list[str]] = [
        ["collect", "--model", model, "--out", str(streams), "--samples", str(samples)],
        ["train", "--collection", str(streams), "--out", str(probe_set), "--name", name, "--target", "damage", "--report", str(work)],
        ["calibrate", *common, "--collection", str(streams), "--report", str(work / "calibration"), "--samples", str(samples // 2)],
        ["validate", *common, "--samples", "12", "--out", str(work / "validation")],
        ["compare", *common, "--samples", "10", "--out", str(work / "comparison")],
        ["certify", *common, "--requests", str(requests), "--eps", str(eps), "--out", str(work)],
        ["report", str(work), "--probe-set", str(probe_set)],
    ]
    work.mkdir(parents=True, exist_ok=True)
    stamps = work / "steps.txt"
    done = stamps.read_text().splitlines() if stamps.exists() else []
    started, is_certified = time.monotonic(), True
    for number, step in enumerate(steps, start=1):
        line = shlex.join(["sedac-probes", *step])
        if line in done:
            typer.echo(f"[{number}/{len(steps)}] done before: {line}")
            continue
        typer.echo(f"[{number}/{len(steps)}] {line}")
        begun = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "sedac_probes.cli", *step], check=False).returncode
        if code and step[0] != "certify":
            raise typer.Exit(code)
        is_certified &= not code  # that nothing could be certified is a result, and the report shows it
        typer.echo(f"[{number}/{len(steps)}] {step[0]}: {time.monotonic() - begun:.0f} s")
        if not code:
            with stamps.open("a") as file:
                file.write(line + "\n")
    typer.echo(f"{work}: {(time.monotonic() - started) / 60:.1f} minutes; open {work / 'report.html'}")
    if not is_certified:
        raise typer.Exit(1)
    typer.echo(f"serve it: sedac serve {model} --probe-set {probe_set}; then: sedac ctl policy apply {work / 'policy.json'} --wait 5")
