"""Speculation against plain vLLM: its own methods and each of SEDAC's drafts, with the controller and with a fixed length.

    python benchmarks/speculation.py --model demo --out benchmarks/results/speculation       the demo model, 10.5 million parameters
    python benchmarks/speculation.py --model mid --out benchmarks/results/speculation        its function in a mid-size shape (grown.py)
    python benchmarks/speculation.py --quick                                                 a smoke run

Every variant is an engine of its own in a process of its own, as it is served: torch.compile, bf16. vLLM's methods
draft 4 tokens at most (suffix: as many as its tree is deep), SEDAC's 4 where the length is fixed and as many as the draft proposes where the
controller chooses; the draft model is the demo model: of its grown self, and, for a bound, of itself. `plain` is
vLLM alone, the plugin not loaded, its own defaults, async scheduling among them; `plain, again` a second such engine, which shows what
two processes of the same kind differ by; `plain, dense` one with dense random weights in the grown model's shape. All engines stay
alive and all but one wait. In a round each runs once, in changing order, on the same held-out prompts, which no other round uses. Timed
is decoding: from the step in which the last request of a batch has its first token to that in which the first is done, by the clock of
vLLM's engine process. A figure is the median over rounds of a variant's tokens per second over plain's of the same round. The first
round warms up and counts nowhere. `lowest 500`: the lowest ratio over any 500 tokens, rounds put together. `same`: tokens that equal
plain vLLM's, which in bf16 only greedy answers can and rounding may change.

`predicted` is tau T1 / (k d + V(n) + o) from what was measured apart: T1 and V, plain vLLM's step with as many sequences as there are
rows to verify; d, a draft pass; o, what a step without drafts takes longer in the drafting engine (it has no async scheduling); tau, k
and n as they came out. Absolute times of a shared machine are noise.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grown
import psutil
import speculation_report as report
from sedac.probe.draft_manifest import read_draft_manifest

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "probes" / "sedac_demo"
MAX_TOKENS = 4
CONTEXTS = {"short": 64, "long": 384}
"""tokens of a prompt"""
OURS = {"controller": {"adaptive": True}, "fixed": {"adaptive": False, "max_tokens": MAX_TOKENS, "min_confidence": 0.0}}
BATCHES, TEMPERATURES = (1, 4, 16), (0.0, 0.8)


class Process:
    """An engine in a process of its own (speculation_engine.py); it works only while it is asked."""

    def __init__(self, name: str, llm: dict[str, Any], log: Path, *, is_ours: bool) -> None:
        """Start it and wait until it is ready.

        Raises:
            SystemExit: it is not.
        """
        env = {k: v for k, v in os.environ.items() if k != "VLLM_CPU_KVCACHE_SPACE"}
        env |= {
            "VLLM_PLUGINS": "sedac" if is_ours else "",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), env.get("PYTHONPATH", "")]),
        }
        if is_ours:
            env["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        self.name, self.is_ours, self.log = name, is_ours, log
        command = [sys.executable, str(HERE / "speculation_engine.py"), json.dumps({"llm": llm, "is_ours": is_ours})]
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True)
        self.about = self._read()
        family = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        self.about["rss_gib"] = sum(p.memory_info().rss for p in family) / 2**30

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Have it do something and wait for the result."""
        assert self._process.stdin is not None
        print(json.dumps({"do": do, **order}), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the engine {self.name!r} ended with code {self._process.wait()}; its log is {self.log}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def make_variants(args: argparse.Namespace) -> dict[str, tuple[dict[str, Any], bool]]:
    """Return the engines by name: arguments for vLLM's `LLM`, and whether it drafts with SEDAC."""
    directory = DEMO if args.model == "demo" else args.grown
    common = {
        "dtype": "bfloat16",
        "max_model_len": 512,
        "disable_log_stats": False,
        "kv_cache_memory_bytes": 2**29,
        "model": str(directory / "model"),
    }
    drafts = {read_draft_manifest(d).kind: d for d in args.draft}
    if args.model == "mid":
        growth = grown.Growth(grown.Shape.of(DEMO / "model"), grown.Shape())
        if not (directory / "model" / "config.json").exists():
            grown.grow_model(DEMO / "model", directory / "model")
            grown.grow_probe_set(DEMO / "probe-set", directory / "probe-set", growth)
        for kind, source in drafts.items():
            grown.grow_draft(source, directory / kind, growth)
            drafts[kind] = directory / kind
    ngram = {"method": "ngram", "num_speculative_tokens": MAX_TOKENS, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    variants: dict[str, tuple[dict[str, Any], bool]] = {
        "plain": ({"kv_cache_memory_bytes": 2**31}, False),
        "plain, again": ({}, False),
        "plain, dense": ({"load_format": "dummy"}, False),
        "ngram": ({"speculative_config": ngram}, False),
        "suffix": ({"speculative_config": {"method": "suffix"}}, False),
        "draft_model": ({"speculative_config": {"method": "draft_model", "model": str(DEMO / "model"), "num_speculative_tokens": MAX_TOKENS}}, False),
    }
    if args.model == "demo":
        del variants["plain, dense"]
    if importlib.util.find_spec("arctic_inference") is None:
        print("suffix is left out: it needs arctic-inference (pip install arctic-inference==0.1.1), which is not installed")
        del variants["suffix"]
    for kind, draft in drafts.items():
        manifest = read_draft_manifest(draft)
        num = max(MAX_TOKENS, manifest.max_tokens)
        speculative = {"method": "custom_class", "model": "sedac.engine.drafting.drafter.Drafter", "num_speculative_tokens": num}
        sedac = {"probe_set": str(directory / "probe-set"), "draft": str(draft.resolve()), "levels": manifest.level != "full"}
        variants[kind] = ({"speculative_config": speculative, "worker_cls": "speculation_worker.Worker", "additional_config": {"sedac": sedac}}, True)
    return {n: ({**common, **options}, ours) for n, (options, ours) in variants.items() if not args.variant or n in (*args.variant, "plain")}


class Prompts:
    """Prompts from files that neither the model nor a draft was trained on, each given out once."""

    def __init__(self) -> None:
        from sedac_probes import corpus
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
        self._texts = [tokenizer(d.text)["input_ids"] for d in corpus.read_stdlib("heldout")]
        random.Random(0).shuffle(self._texts)
        self._places = {length: self._walk(length) for length in CONTEXTS.values()}

    def _walk(self, length: int) -> Iterator[list[int]]:
        for start in range(0, 1 << 20, length):
            yield from (text[start : start + length] for text in self._texts if len(text) >= start + length)
        raise SystemExit("the held-out files have no more prompts; ask for fewer rounds")

    def take(self, length: int, waves: int, batch: int) -> list[list[list[int]]]:
        """Return prompts of `length` tokens for `waves` times `batch` requests."""
        return [[next(self._places[length]) for _ in range(batch)] for _ in range(waves)]


def median_step(run: dict[str, Any]) -> float:
    """Return the median step of a run in seconds."""
    return statistics.median(seconds for seconds, _ in report.get_steps(run))


def calibrate(engines: dict[str, Process], prompts: Prompts, length: int, batches: list[int], temperature: float) -> dict[str, dict[str, Any]]:
    """Measure, apart from the rounds, what the cost model is made of; by engine with drafts of SEDAC's."""
    steps: dict[int, list[float]] = {n: [] for n in sorted({1, 2, 3, 4, 5, 8, 16, 20, 32} | ({48, 80} if length < 128 else set()))}
    ours = {name: engine for name, engine in engines.items() if engine.is_ours}
    found: dict[str, dict[str, Any]] = {name: {"passes": {}, "overhead": {}} for name in ours}
    for _ in range(2):
        for n, values in steps.items():
            if n <= max(batches) * (MAX_TOKENS + 1):
                values.append(median_step(engines["plain"].ask("run", waves=prompts.take(length, 1, n), num_tokens=12, temperature=temperature)))
    curve = {n: min(values) for n, values in steps.items() if values}
    for batch in batches:
        waves = prompts.take(length, 1, batch)
        for name, engine in ours.items():
            order = {"waves": waves, "num_tokens": 24, "temperature": temperature}
            engine.ask("set", speculation=OURS["fixed"], controller="calibration")
            engine.ask("run", **order)
            own = engine.ask("run", **order)["own"]
            found[name]["passes"][batch] = own["draft_seconds"] / own["num_passes"]
            engine.ask("set", speculation={"enabled": False}, controller="calibration")
            off = median_step(engine.ask("run", **order))
            plain = median_step(engines["plain"].ask("run", **order))
            found[name]["overhead"][batch] = off - plain
    return {name: {**costs, "steps": curve} for name, costs in found.items()}


def measure(
    engines: dict[str, Process], prompts: Prompts, args: argparse.Namespace, setting: dict[str, Any], costs: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Run the rounds of one setting; returns one record per variant."""
    from tqdm import tqdm

    batch, temperature = setting["batch"], setting["temperature"]
    runs: dict[str, list[dict[str, Any]]] = {}
    rounds = args.rounds + 1
    for number in tqdm(range(rounds), desc=", ".join(map(str, setting.values())), unit="round", leave=False):
        waves = prompts.take(CONTEXTS[setting["context"]], args.waves, batch)
        order = [(engine, mode) for engine in engines.values() for mode in (OURS if engine.is_ours else ("",))]
        random.Random(number).shuffle(order)
        with locked(args.lock):
            for engine, mode in order:
                if mode:
                    answer = engine.ask("set", speculation=OURS[mode], controller=f"{setting} {mode}")
                    assert not answer["violations"], answer
                run = engine.ask("run", waves=waves, num_tokens=args.tokens, temperature=temperature)
                if number:
                    runs.setdefault(f"{engine.name}, {mode}" if mode else engine.name, []).append(run)
    names = [f"{e.name}, {mode}" if mode else e.name for e in engines.values() for mode in (OURS if e.is_ours else ("",))]
    return [{**setting, "variant": name, **report.make_record(batch, runs[name], runs["plain"], costs.get(name.split(", ")[0]))} for name in names]


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Hold an advisory lock on `path`, None: nothing."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Start the engines, run every setting, print the table; written after each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["demo", "mid"], default="demo")
    parser.add_argument("--draft", type=Path, nargs="*", help="drafts of the demo model, one of a kind; default: those that it brings")
    parser.add_argument("--variant", action="append", help="only plain and these (repeat); default: all")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--temperature", type=float, nargs="+", default=list(TEMPERATURES))
    parser.add_argument("--context", choices=list(CONTEXTS), nargs="+", default=list(CONTEXTS), help="prompts of 64 or 384 tokens")
    parser.add_argument("--rounds", type=int, default=5, help="per setting, after one to warm up")
    parser.add_argument("--tokens", type=int, default=96, help="that a request generates at most, up to 127")
    parser.add_argument("--waves", type=int, default=4, help="per round: as many requests at once as the batch has, one wave after the other")
    parser.add_argument("--grown", type=Path, default=HERE.parent / "build" / "grown", help="where the grown model is kept (1 GB)")
    parser.add_argument("--out", type=Path, help="write NAME.json and NAME.png; other settings and variants in NAME.json are kept")
    parser.add_argument("--lock", type=Path, help="hold this file's lock while an engine works: for machines shared with others who do")
    parser.add_argument("--quick", action="store_true", help="two rounds of little in few settings")
    args = parser.parse_args()
    args.draft = args.draft if args.draft is not None else [DEMO / "draft", *sorted((DEMO / "drafts").iterdir())]
    if args.quick:
        args.batch, args.temperature, args.context, args.rounds, args.tokens, args.waves = [1, 4], [0.0], ["short"], 2, 32, 2
    logs = HERE.parent / "build" / "speculation-logs"
    logs.mkdir(parents=True, exist_ok=True)
    prompts, engines, records = Prompts(), {}, []
    for name, (llm, is_ours) in make_variants(args).items():
        with locked(args.lock):
            began = time.monotonic()
            engines[name] = engine = Process(name, llm, logs / f"{args.model}-{name.replace(', ', '-')}.log", is_ours=is_ours)
        about = (
            f"{engine.about['kv_bytes_per_token']:,.0f} bytes of KV cache per token, {'async' if engine.about['async'] else 'no async'} scheduling"
        )
        print(f"{name}: ready after {time.monotonic() - began:.0f} s, {engine.about['rss_gib']:.1f} GiB; {about}", flush=True)
    costs: dict[str, dict[str, Any]] = {}
    for temperature in args.temperature:
        for context in args.context:
            with locked(args.lock):
                costs = calibrate(engines, prompts, CONTEXTS[context], args.batch, temperature)
            for batch in args.batch:
                setting = {"model": args.model, "temperature": temperature, "context": context, "batch": batch}
                records += measure(engines, prompts, args, setting, costs)
                if args.out:
                    report.save(args.out, records, {f"{args.model} {name}": engine.about for name, engine in engines.items()})
    for engine in engines.values():
        engine.close()
    report.print_table(records)


if __name__ == "__main__":
    main()
