"""The real vLLM with and without SEDAC on one GPU: the same answers on the demo model, and the speed of a 7B-shaped dummy.

    python benchmarks/cuda/engine.py --out DIR --seconds 300                   on a GPU
    python benchmarks/cuda/engine.py --out DIR --seconds 300 --vllm FOLDER     where vLLM is not installed but unpacked
    python benchmarks/cuda/engine.py --out DIR --dry-run                       on a CPU, with tiny shapes: the same order, lock and files

Every engine is a process of its own (engine_variants.py lists them); they start together, then take turns. A row is printed, and appended
to DIR/engine.jsonl, as soon as it is measured, the most telling first; DIR/engine.json and DIR/engine.md are written at the end, also when
the time is over or a signal comes. An engine that dies or hangs is told with what its log ends with, and passed over; logs are in DIR/logs.
The exit status is 1 where anything failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

import engine_models
import engine_report
from engine_process import REPOSITORY, TERM_SECONDS, EngineFault, EngineProcess, make_environment
from engine_variants import DEMO_SEDAC, DEMO_V1, DEMO_V2, ENGINES, SEDAC, Engine, Wave, make_watching_policy, make_waves

sys.path.insert(0, str(REPOSITORY / "service"))

CAPTURE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
EXACT_BATCHES = (1, 4, 16)
EXACT_ANSWERS = 4
"""The number of answers that each batch size is compared on, at least."""
PAST_GRAPHS = 320
"""tokens of a pass that no CUDA graph holds"""
DEMO_SHARE, START_SHARE, EXACT_SHARE = 0.5, 0.7, 0.8
"""Shares of the time: until the first, the demo's engines are waited for before all others; until the second, every engine must have started;
until the third, answers are compared."""
END_SECONDS = 8.0
"""kept for ending the processes"""


class Interrupted(Exception):
    """A signal asked for the end."""


class Session:
    """One run: its processes, its rows, its time."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.started = time.perf_counter()
        self.out, self.work, self.dry, self.budget, self.vllm = arguments.out, work, arguments.dry_run, arguments.seconds, arguments.vllm
        self.num_rounds = arguments.rounds or (2 if self.dry else 3)
        self.num_tokens = arguments.tokens or (8 if self.dry else 64)
        self.shape = engine_models.TINY if self.dry else engine_models.QWEN_7B
        self.rows: list[dict[str, Any]] = []
        self.left: list[str] = []
        self.pending: list[Wave] = []
        self.engines: dict[str, EngineProcess] = {}
        self.told: set[str] = set()
        self.wanted = [e for e in ENGINES if not arguments.engines or e.name in arguments.engines]
        self.out.mkdir(parents=True, exist_ok=True)
        self._lines = (self.out / "engine.jsonl").open("w")

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    def get_limit(self, most: float) -> float:
        """Return how many seconds something may take, at most `most`; 0: the time is over."""
        return max(0.0, min(most, self.budget - END_SECONDS - self.spent))

    def add(self, kind: str, **row: Any) -> None:
        """Keep a row, print it, and append it to the file."""
        whole = {"kind": kind, "at": round(self.spent, 1), **row}
        self.rows.append(whole)
        self._lines.write(json.dumps(whole) + "\n")
        self._lines.flush()
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if not isinstance(v, list)}
        print(f"[{self.spent:6.1f} s] {kind}: " + ", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)

    def start(self) -> None:
        """Start every engine's process."""
        dummy = engine_models.write_dummy(self.work / "dummy", self.shape)
        probe_set = engine_models.write_probe_set(self.work / "dummy-probe-set", self.shape)
        for engine in self.wanted:
            options = self._make_options(engine, dummy, probe_set)
            environment = make_environment(
                engine.name, self.work, is_v2=engine.is_v2, is_ours=engine.is_ours, vllm=self.vllm, on_cpu=self.dry
            )  # fmt: skip
            self.engines[engine.name] = EngineProcess(engine.name, options, environment, work=self.work, logs=self.out / "logs")

    def _make_options(self, engine: Engine, dummy: Path, probe_set: Path) -> dict[str, Any]:
        is_demo = engine.model == "demo"
        options: dict[str, Any] = {
            "model": str(engine_models.DEMO / "model" if is_demo else dummy), "dtype": "bfloat16", "enable_prefix_caching": False, "seed": 0,
            "max_model_len": 512 if is_demo else 1024, "max_num_seqs": 16 if is_demo else 128, "max_num_batched_tokens": 2048,
            "kv_cache_memory_bytes": (64 << 20) if self.dry else (1 << 29) if is_demo else (2 << 30), "gpu_memory_utilization": 0.15,
        }  # fmt: skip
        options |= {"enforce_eager": True} if self.dry else {"compilation_config": {"cudagraph_capture_sizes": list(CAPTURE_SIZES)}}
        if not is_demo:
            options |= {"load_format": "dummy", "skip_tokenizer_init": True}
        if engine.is_ours:
            worker = "sedac.engine.step.worker.SedacWorker" if is_demo else "engine_worker.Worker"
            directory = engine_models.DEMO / "probe-set" if is_demo else probe_set
            entry: dict[str, Any] = {"probe_set": str(directory)}
            if is_demo and not self.dry:
                entry["min_weight_mib"] = 0  # or the forms of a GPU would leave so small a model whole; a CPU's have no such limit
            options |= {"worker_cls": worker, "additional_config": {"sedac": entry}}
        return options

    def wait(self, share: float, model: str = "") -> bool:
        """Wait for a model's engines (empty: for all) until a share of the time is over; tell what has started, and whether all did."""
        for engine in self.wanted:
            process = self.engines[engine.name]
            if model not in ("", engine.model) or engine.name in self.told:
                continue
            try:
                process.wait_ready(self.get_limit(share * self.budget - self.spent))
            except EngineFault:
                self.told.add(engine.name)
                self.add("fault", engine=engine.name, what="start", reason=process.fault)
            if process.about is not None:
                self.told.add(engine.name)
                self.add("start", engine=engine.name, **process.about)
        return all(e.name in self.told for e in self.wanted if model in ("", e.model))

    def give_up_late(self) -> None:
        """End the engines that have not started by now: they would disturb what is timed."""
        for name, process in self.engines.items():
            if name not in self.told:
                process.give_up(f"not ready after {time.perf_counter() - process.started:.0f} s")
                self.add("fault", engine=name, what="start", reason=process.fault)

    def run(self) -> None:
        """Compare the demo model's answers as soon as its engines are there, then time the others."""
        self.start()
        is_compared = self.wait(DEMO_SHARE, "demo")
        if is_compared:
            self.compare_answers()
        self.wait(START_SHARE)
        self.give_up_late()
        if not is_compared:
            self.compare_answers()
        self.measure_speed()

    def ask(self, name: str, most: float, what: str, **order: Any) -> dict[str, Any] | None:
        """Give an engine an order; None where it can't be asked, or the time is over, or it failed, which is told."""
        process = self.engines.get(name)
        if process is None or not process.is_alive or not self.get_limit(1):
            return None
        try:
            return process.ask(self.get_limit(most), **order)
        except EngineFault as fault:
            if self.get_limit(1) > 0:
                self.add("fault", engine=name, what=what, reason=str(fault))
            return None

    def compare_answers(self) -> None:
        """Hold the demo engines' answers against plain V1's, which has SEDAC's model runner."""
        prompts, policy = engine_models.read_prompts(16), engine_models.read_demo_policy()
        answers: dict[tuple[str, str, int], list[dict[str, Any]]] = {}

        def generate(name: str, asked: str, batch: int, policy: dict[str, Any], tier: str = "") -> list[dict[str, Any]] | None:
            found = []
            for first in range(0, max(EXACT_ANSWERS, batch), batch):
                if self.spent > EXACT_SHARE * self.budget:
                    self.left.append(f"{name}, {asked}, batch {batch}")
                    return None
                texts, what = prompts[first : first + batch], f"{asked}, batch {batch}"
                answer = self.ask(name, 60, what, do="generate", texts=texts, num_tokens=min(48, self.num_tokens), policy=policy, tier=tier)
                if answer is None:
                    return None
                found += answer["answers"]
            answers[name, asked, batch] = found
            return found

        for batch in EXACT_BATCHES:
            reference = generate(DEMO_V1, "plain", batch, {})
            for name, asked, enabled in (
                (DEMO_SEDAC, "policy disabled", False), (DEMO_SEDAC, "tier exact", True),
                (DEMO_V1, "plain, once more", False), (DEMO_V2, "plain", False),
            ):  # fmt: skip
                found = generate(name, asked, batch, {**policy, "enabled": enabled}, "exact" if enabled else "")
                if found is not None and reference is not None:
                    self.add("exact", engine=name, asked=asked, against=DEMO_V1, batch=batch, **engine_report.compare(found, reference))
        for batch in (EXACT_BATCHES[0], EXACT_BATCHES[-1]):
            for tier in ("exact", *(t["name"] for t in policy["tiers"])):
                found = generate(DEMO_SEDAC, f"tier {tier}", batch, policy, tier)
                if found is not None:
                    other = answers.get((DEMO_V1, "plain", batch))
                    equal = engine_report.compare(found, other)["equal tokens"] if other else None
                    self.add("tier", tier=tier, batch=batch, mlp_share=sum(a["mlp_share"] for a in found) / len(found), **{"equal tokens": equal})

    def measure_speed(self) -> None:
        """Let the 7B-shaped engines take turns."""
        names = tuple(n for n, e in self.engines.items() if e.is_alive)
        watching = make_watching_policy(self.shape.num_layers)
        found = self.ask(SEDAC, 60, "calibration", do="calibrate", share=0.5, num_tokens=PAST_GRAPHS, policy=watching)
        if found is not None:
            self.add("calibration", engine=SEDAC, **found)
        waves = list(make_waves(self.num_rounds, names))
        for number, wave in enumerate(waves):
            self.pending = waves[number:]
            if not self.get_limit(1):
                return
            self._measure(wave)
        self.pending = []

    def _measure(self, wave: Wave) -> None:
        variant = wave.variant
        answer = self.ask(
            variant.engine, 60, f"{variant.name}, batch {wave.batch}", do="measure", batch=wave.batch, num_prompt=16 if self.dry else 64,
            num_tokens=self.num_tokens, policy=variant.make_policy(self.shape.num_layers), tier=variant.tier if variant.engine == SEDAC else "",
        )  # fmt: skip
        if answer is not None:
            where = {"batch": wave.batch, "phase": wave.phase, "round": wave.round}
            self.add("speed", engine=variant.engine, variant=variant.name, **where, **answer)

    def finish(self, ended: str) -> str:
        """Write the files, then end the processes, all at once; returns the tables."""
        device = next((r["device"] for r in self.rows if r["kind"] == "start"), "no engine started")
        left = [*self.left, *sorted({f"{w.variant.name}, batch {w.batch}" for w in self.pending})]
        about = {
            "ended": ended, "seconds": self.spent, "budget": self.budget, "is_dry_run": self.dry, "device": device, "left": left,
            "rounds": self.num_rounds, "tokens": self.num_tokens, "shape": vars(self.shape),
        }  # fmt: skip
        text = engine_report.write(self.out, self.rows, about)
        for process in self.engines.values():
            process.terminate()
        last = time.perf_counter() + TERM_SECONDS
        for process in self.engines.values():
            process.end(max(0.0, last - time.perf_counter()))
        return text


def check(arguments: argparse.Namespace) -> None:
    """Refuse what can't be run here.

    Raises:
        SystemExit: no vLLM, or no GPU without --dry-run; says what is needed.
    """
    found = (arguments.vllm / "vllm").is_dir() if arguments.vllm else importlib.util.find_spec("vllm") is not None
    if not found:
        raise SystemExit(f"no vLLM in {arguments.vllm or 'this Python'}; install it, or name the folder that it is unpacked in with --vllm")
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --dry-run goes through everything on a CPU, with tiny shapes")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(signal.Signals(number).name)


def main() -> None:
    """Start the engines, compare, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for engine.jsonl, engine.json, engine.md and logs")
    parser.add_argument("--seconds", type=float, default=300, help="for everything, start and end included; default 300")
    parser.add_argument("--vllm", type=lambda text: Path(text).resolve(), help="folder that vLLM is unpacked in, where it is not installed")
    parser.add_argument("--work", type=Path, help="keep models and compiled code here, for another run; default: a temporary folder")
    parser.add_argument("--engines", nargs="*", choices=[e.name for e in ENGINES], help="only these")
    parser.add_argument("--rounds", type=int, help="default 3, with --dry-run 2")
    parser.add_argument("--tokens", type=int, help="that each request generates in a timing; default 64, with --dry-run 8")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny shapes")
    arguments = parser.parse_args()
    check(arguments)
    work = arguments.work.resolve() if arguments.work else Path(tempfile.mkdtemp(prefix="sedac-engine-"))
    work.mkdir(parents=True, exist_ok=True)
    session = Session(arguments, work)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    ended = "ended by an error"
    try:
        session.run()
        ended = "done" if session.get_limit(1) else "out of time"
    except Interrupted as signalled:
        ended = f"ended by {signalled}"
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        print("\n" + session.finish(ended), flush=True)
        if not arguments.work:
            shutil.rmtree(work, ignore_errors=True)
    if any(row["kind"] == "fault" for row in session.rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
