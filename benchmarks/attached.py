"""What attaching costs and exits save, against plain vLLM without the plugin, interleaved within one run.

    python benchmarks/attached.py                       24 layers, hidden 1024, intermediate 4096, random weights, bf16
    python benchmarks/attached.py --model probes/demo/model --probe-set probes/demo/probe-set

Two engines run side by side in processes of their own and take turns; every round times each variant once, in changing
order, and gives one ratio per variant: plain time over the variant's time (1.00 = as fast as plain vLLM, above = faster).
Which of two equal processes was started first can matter by 10 %, so everything is measured in both start orders: the table
shows the geometric mean of the two medians, and the medians. Absolute times of a shared machine are noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sedac.probe import artifact
from sedac.probe.manifest import Manifest, ProbeRecord, read_manifest
from sedac.probe.probe import LREProbe
from tqdm import tqdm

_SHAPE = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096}
_LAYERS = (6, 12, 18)
_VARIANTS = {"attached, idle": (False, 0.0), "probes on, nothing exits": (True, 1e-30), "all exit at the first checkpoint": (True, 1e30)}


class Engine:
    """A running engine_worker.py."""

    def __init__(self, job: dict[str, Any]) -> None:
        command = [sys.executable, str(Path(__file__).with_name("engine_worker.py")), json.dumps(job)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True)
        self._read()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send one command and return its answer."""
        assert self._process.stdin is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"the engine ended:\n{self._log.read()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def make_random_model(directory: Path) -> tuple[Path, Path]:
    """Write the configuration of the random model and a random probe set; weights are made by vLLM."""
    from transformers import Qwen2Config

    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 512}
    config = Qwen2Config(**_SHAPE, **heads, architectures=["Qwen2ForCausalLM"], torch_dtype="bfloat16", use_sliding_window=False)
    config.save_pretrained(directory / "model")
    size, depth = _SHAPE["hidden_size"], _SHAPE["num_hidden_layers"]
    records = tuple(ProbeRecord(layer=layer, threshold=0.5) for layer in _LAYERS)
    manifest = Manifest(name="random", model="random", hidden_size=size, num_layers=depth, rank=64, target="none", probes=records)
    artifact.save(directory / "probe-set", manifest, {layer: LREProbe(size, 64) for layer in _LAYERS})
    return directory / "model", directory / "probe-set"


def measure(plain: Engine, attached: Engine, layers: list[int], batch: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Return per variant the ratios plain seconds / variant seconds, one per round."""
    ratios: dict[str, list[float]] = {name: [] for name in _VARIANTS}
    for number in tqdm(range(rounds + 1), desc=f"batch {batch}", unit="round", leave=False):
        order = ["plain", *_VARIANTS]
        random.Random(number).shuffle(order)
        seconds = {}
        for name in order:
            if name == "plain":
                seconds[name] = plain.ask(batch=batch, tokens=tokens)["seconds"]
                continue
            enabled, threshold = _VARIANTS[name]
            checkpoints = [{"layer": layer, "threshold": threshold} for layer in layers]
            attached.ask(policy={"enabled": enabled, "checkpoints": checkpoints}, revision=number + 1)
            seconds[name] = attached.ask(batch=batch, tokens=tokens)["seconds"]
        if number:  # the first round warms up
            for name, values in ratios.items():
                values.append(seconds["plain"] / seconds[name])
    return ratios


def main() -> None:
    """Measure every mode and batch size, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; default: the random 24-layer model")
    parser.add_argument("--probe-set", type=Path, help="probe set of that model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="requests at once")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate per request")
    parser.add_argument("--rounds", type=int, default=9, help="rounds per batch size and start order, after one to warm up")
    parser.add_argument("--mode", choices=["eager", "compiled"], nargs="+", default=["eager", "compiled"])
    parser.add_argument("--out", type=Path, help="write the ratios as JSON")
    args = parser.parse_args()
    title = "plain vLLM = 1.00, higher is faster"
    table = Table("mode", "batch", "variant", "speed against plain", "plain started first", "attached started first", title=title, box=None)
    results = []
    with tempfile.TemporaryDirectory() as directory:
        llm: dict[str, Any] = {"dtype": "bfloat16"}
        if args.model:
            model, probe_set = args.model.resolve(), args.probe_set.resolve()
        else:
            model, probe_set = make_random_model(Path(directory))
            llm |= {"load_format": "dummy", "skip_tokenizer_init": True}
        layers = [p.layer for p in read_manifest(probe_set).probes]
        for mode in args.mode:
            job = {"llm": llm | {"model": str(model), "enforce_eager": mode == "eager"}}
            measured: list[dict[int, dict[str, list[float]]]] = []
            for plain_first in (True, False):
                jobs = {"plain": job, "attached": job | {"sedac": {"probe_set": str(probe_set)}}}
                engines = {name: Engine(jobs[name]) for name in (jobs if plain_first else reversed(jobs))}
                sizes = {b: measure(engines["plain"], engines["attached"], layers, b, args.tokens, args.rounds) for b in args.batch}
                measured.append(sizes)
                for engine in engines.values():
                    engine.close()
            for batch, name in itertools.product(args.batch, _VARIANTS):
                medians = [statistics.median(sizes[batch][name]) for sizes in measured]
                speed = statistics.geometric_mean(medians)
                table.add_row(mode, str(batch), name, f"{speed:.3f}", *(f"{median:.3f}" for median in medians))
                ratios = [sizes[batch][name] for sizes in measured]
                results.append({"mode": mode, "batch": batch, "variant": name, "speed": speed, "ratios": ratios})
    Console().print(table)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
