"""What attaching costs and what reduced tokens save, against plain vLLM, interleaved in one process.

    python benchmarks/speed.py                      24 layers, hidden 1024, intermediate 4096, random weights, bf16
    python benchmarks/speed.py --mode eager --batch 1 --variant idle --variant "skip from layer 6"

Two engines live in one process, plain vLLM and one with SEDAC attached, and share their packed weights byte for byte, so
that where weights happen to lie in memory favours neither. Every round times each variant once, in changing order, and
takes the median decode step of each; a variant's figure is the median over the rounds of plain time / its own time (1.00 =
as fast as plain, above = faster). `step` is the whole engine's step with scheduler, sampler and Python; `model` the forward
pass and the logits alone, which is what SEDAC can save on. `ideal` is what the saved bytes (few rows) or FLOPs (many) alone
would give, from the share of MLP work that the workers counted; `of ideal` holds `model` against it. `by products` is what
would come out if plain vLLM's own MLPs, timed alone, got shorter by that share (where requests skip: ran on the rows that are
left) and nothing else changed: between the two shows what bytes and FLOPs promise and a matrix product does not deliver.
Absolute times of a shared machine are noise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_USE_V2_MODEL_RUNNER="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_PLUGINS="sedac",
)

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY, KV_HEADS, HEADS = 24, 1024, 4096, 32000, 8, 16
CHECKPOINTS = (6, 12, 18)
HALF_ACTIVE = 3.54e-6
"""threshold at which half the neurons pass: the median of abs(gate), uniform random weights of +-1e-3 everywhere"""


def _policy(threshold: float, level: str = "skip", floor: str = "full", share: float = 1.0) -> dict[str, Any]:
    checkpoints = [{"layer": layer, "threshold": threshold} for layer in CHECKPOINTS]
    tiers = [{"name": "balanced", "level": level, "floor": floor}]
    return {"policy": {"enabled": True, "checkpoints": checkpoints, "tiers": tiers}, "share": share}


VARIANTS: dict[str, dict[str, Any]] = {
    "idle": {"policy": {"enabled": False}, "share": 1.0},
    "probes on, nothing exits": _policy(1e-30),
    "skip from layer 6": _policy(1e30),
    "width 1/2": _policy(0.0, level="width-50", floor="width-50"),
    "contextual, half active": _policy(0.0, level="contextual-33", floor="contextual-33"),
    "25 % skip from layer 6": _policy(1e30, share=0.25),
    "50 % skip from layer 6": _policy(1e30, share=0.5),
    "75 % skip from layer 6": _policy(1e30, share=0.75),
}


def make_model(directory: Path) -> tuple[Path, Path]:
    """Write the configuration of the random model (vLLM makes the weights) and a probe set with two levels for it."""
    import torch
    from sedac.probe import artifact
    from sedac.probe.levels import Level, Neurons
    from sedac.probe.manifest import LevelRecord, Manifest, ProbeRecord
    from sedac.probe.probe import LREProbe
    from transformers import Qwen2Config

    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    config = Qwen2Config(**sizes, **heads, architectures=["Qwen2ForCausalLM"], torch_dtype="bfloat16", use_sliding_window=False)
    config.save_pretrained(directory / "model")
    records = tuple(ProbeRecord(layer=layer, threshold=0.5) for layer in CHECKPOINTS)
    levels = (
        Level(name="contextual-33", reduction="contextual", parameters_L=torch.full((LAYERS,), HALF_ACTIVE)),
        Level(name="width-50", reduction="width", parameters_L=torch.full((LAYERS,), INTERMEDIATE // 2, dtype=torch.int32)),
    )
    manifest = Manifest(
        name="random", model="random", hidden_size=HIDDEN, num_layers=LAYERS, rank=64, target="none", probes=records,
        intermediate_size=INTERMEDIATE, activation="silu", score="gate",
        levels=(LevelRecord(name="contextual-33", reduction="contextual", saved=0.33, perplexity_ratio=1.0),
                LevelRecord(name="width-50", reduction="width", saved=0.5, perplexity_ratio=1.0)),
    )  # fmt: skip
    neurons = {
        i: Neurons(order_F=torch.randperm(INTERMEDIATE, dtype=torch.int32), scale_F=torch.ones(INTERMEDIATE), repair_FD=None) for i in range(LAYERS)
    }
    artifact.save(directory / "probe-set", manifest, {layer: LREProbe(HIDDEN, 64) for layer in CHECKPOINTS}, levels=levels, neurons=neurons)
    return directory / "model", directory / "probe-set"


def share_weights() -> None:
    """Let every engine after the first take the first one's packed weights, in the order in which layers are packed."""
    from vllm import _custom_ops as ops

    make, packed, taken = ops.create_onednn_mm, [], [0]

    def create(weight: Any, cache_size: int = 128) -> Any:
        if taken[0] >= 0 and not share_weights.second:  # type: ignore[attr-defined]
            packed.append(make(weight, cache_size))
            return packed[-1]
        taken[0] += 1
        handler = packed[taken[0] - 1]
        assert (handler.k, handler.n) == tuple(weight.shape), "the engines pack their layers in different orders"
        return handler

    share_weights.second = False  # type: ignore[attr-defined]
    ops.create_onednn_mm = create


class Engine:
    """A vLLM engine in this process that can be timed step by step."""

    def __init__(self, model: Path, sedac: dict[str, Any] | None, **keywords: Any) -> None:
        from vllm import LLM

        if sedac is not None:
            keywords |= {"worker_cls": "sedac.engine.step.worker.SedacWorker", "additional_config": {"sedac": sedac}}
        self.llm = LLM(
            model=str(model), dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, max_model_len=512, max_num_seqs=32,
            max_num_batched_tokens=2048, enable_prefix_caching=False, **keywords,
        )  # fmt: skip
        self._model_seconds = 0.0
        runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        runner._model_forward = self._timed(runner._model_forward)
        runner.model.compute_logits = self._timed(runner.model.compute_logits)

    def _timed(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._model_seconds += time.perf_counter() - started

        return timed

    def apply(self, policy: dict[str, Any]) -> None:
        answer = self.llm.collective_rpc("sedac_apply", args=({"strict": True, **policy}, 1))[0]  # also where serving would not choose a level
        if answer["violations"]:
            raise SystemExit(f"the policy was refused: {answer['violations']}")

    def time_mlps(self, batch: int) -> float:
        """Return the seconds that the MLPs of all layers take, one after the other, for `batch` rows."""
        import torch

        layers = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.model.layers
        x_TD, passes = torch.randn(batch, HIDDEN, dtype=torch.bfloat16), []
        with torch.inference_mode():
            for _ in range(4):
                started = time.perf_counter()
                for layer in layers:
                    layer.mlp(x_TD)
                passes.append(time.perf_counter() - started)
        return statistics.median(passes[1:])

    def get_saved(self) -> tuple[float, float]:
        stats = self.llm.collective_rpc("sedac_get_stats")[0]
        return stats["num_mlp_blocks_skipped"], stats["num_decode_tokens"]

    def time_step(self, batch: int, tokens: int, share: float) -> tuple[float, float]:
        """Generate and return the median decode step and the model's part of it, in seconds; only `share` of the requests may be reduced."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        for i in range(batch):
            extra = {"sedac_tier": "exact" if i >= round(share * batch) else "balanced"}
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra)
            engine.add_request(f"{time.monotonic_ns()}-{i}", {"prompt_token_ids": [(7 * i + j) % 200 + 10 for j in range(16)]}, params)
        steps, models = [], []
        while engine.has_unfinished_requests():
            started, self._model_seconds = time.perf_counter(), 0.0
            engine.step()
            steps.append(time.perf_counter() - started)
            models.append(self._model_seconds)
        return statistics.median(steps[2:-1]), statistics.median(models[2:-1])


def get_ideal(saved: float) -> float:
    """Return the speed-up that saving the share `saved` of all MLP work gives if nothing but bytes (or FLOPs) took time."""
    attention = HIDDEN * HIDDEN * 2 + 2 * HIDDEN * HIDDEN * KV_HEADS // HEADS
    mlps, rest = LAYERS * 3 * HIDDEN * INTERMEDIATE, LAYERS * attention + HIDDEN * VOCABULARY
    return (mlps + rest) / (mlps * (1 - saved) + rest)


def measure(plain: Engine, attached: Engine, names: list[str], batch: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Return one record per variant."""
    from tqdm import tqdm

    rounds_of: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    saved: dict[str, float] = {}
    rows_left = {name: round((1 - VARIANTS[name]["share"]) * batch) for name in names}
    plain_seconds: list[tuple[float, float]] = []
    mlp_shares: dict[int, list[float]] = {rows: [] for rows in {batch, *rows_left.values()} if rows}  # of plain's model time, by rows
    for number in tqdm(range(rounds + 1), desc=f"batch {batch}", unit="round", leave=False):
        order = ["plain", *names]
        random.Random(number).shuffle(order)
        seconds = {}
        for name in order:
            if name == "plain":
                seconds[name] = plain.time_step(batch, tokens, 1.0)
                continue
            attached.apply(VARIANTS[name]["policy"])
            before = attached.get_saved()[0]
            seconds[name] = attached.time_step(batch, tokens, VARIANTS[name]["share"])
            saved[name] = (attached.get_saved()[0] - before) / (batch * (tokens - 1) * LAYERS)
        if number:  # the first round warms up
            plain_seconds.append(seconds["plain"])
            for rows, shares in mlp_shares.items():
                shares.append(plain.time_mlps(rows) / seconds["plain"][1])
            for name, values in rounds_of.items():
                values.append((seconds["plain"][0] / seconds[name][0], seconds["plain"][1] / seconds[name][1]))
    step, model = (statistics.median(s[i] for s in plain_seconds) * 1e3 for i in (0, 1))
    mlps = {0: 0.0} | {rows: statistics.median(shares) for rows, shares in mlp_shares.items()}
    print(f"batch {batch}: plain vLLM's median step {step:.1f} ms, of which the model {model:.1f} ms, {mlps[batch]:.0%} of that in MLPs")
    records = []
    for name, values in rounds_of.items():
        steps, models = [v[0] for v in values], [v[1] for v in values]
        deciles = statistics.quantiles(models, n=10)
        measured = {"saved": saved[name], "step": statistics.median(steps), "model": statistics.median(models), "ideal": get_ideal(saved[name])}
        layers = saved[name] / VARIANTS[name]["share"]  # the share of MLP work that each reduced request saves
        measured["by_products"] = 1 / (1 - layers * (mlps[batch] - mlps[rows_left[name]]))
        records.append({"batch": batch, "variant": name, **measured, "low": deciles[0], "high": deciles[-1]})
    return records


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw measured speed against ideal, one panel per mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = sorted({r["mode"] for r in results})
    figure, axes = plt.subplots(1, len(modes), figsize=(6 * len(modes), 4.5), layout="constrained", squeeze=False)
    for ax, mode in zip(axes[0], modes, strict=True):
        for batch in sorted({r["batch"] for r in results}):
            rows = [r for r in results if r["mode"] == mode and r["batch"] == batch]
            ax.errorbar(
                [r["ideal"] for r in rows], [r["model"] for r in rows], fmt="o", label=f"batch {batch}",
                yerr=[[max(0, r["model"] - r["low"]) for r in rows], [max(0, r["high"] - r["model"]) for r in rows]],
            )  # fmt: skip
        top = max(r["ideal"] for r in results) * 1.05
        ax.plot([1, top], [1, top], color="grey", linewidth=0.8)
        ax.set(xlabel="ideal speed-up from saved bytes or FLOPs", ylabel="measured speed-up of the model over plain vLLM's", title=mode)
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure every mode and batch size, print the table, write JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="requests at once")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate per request")
    parser.add_argument("--rounds", type=int, default=9, help="rounds per batch size, after one to warm up")
    parser.add_argument("--mode", choices=["eager", "compiled"], default="eager", help="one per process: engines share weights and graphs")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="only these (repeat); default: all")
    parser.add_argument("--out", type=Path, help="write NAME.json and NAME.png; results of other modes in NAME.json are kept")
    args = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory() as directory:
        model, probe_set = make_model(Path(directory))
        share_weights()
        eager = args.mode == "eager"
        attached = Engine(model, {"probe_set": str(probe_set)}, enforce_eager=eager)
        share_weights.second = True  # type: ignore[attr-defined]
        plain = Engine(model, None, enforce_eager=eager)
        results = []
        for batch in args.batch:
            names = [n for n in args.variant or VARIANTS if batch > 1 or VARIANTS[n]["share"] == 1.0]
            results += [{"mode": args.mode, **record} for record in measure(plain, attached, names, batch, args.tokens, args.rounds)]
    columns = ("mode", "batch", "variant", "MLP work saved", "step", "model", "10 to 90 %", "ideal", "of ideal", "by products")
    table = Table(*columns, title="plain vLLM = 1.00, higher is faster", box=None)
    for r in results:
        spread = f"{r['low']:.3f} .. {r['high']:.3f}"
        values = [f"{r['saved']:.3f}", f"{r['step']:.3f}", f"{r['model']:.3f}", spread, f"{r['ideal']:.3f}", f"{r['model'] / r['ideal']:.3f}"]
        values.append(f"{r['by_products']:.3f}")
        table.add_row(r["mode"], str(r["batch"]), r["variant"], *values)
    Console(width=130).print(table)
    if args.out:
        path = args.out.with_suffix(".json")
        kept = [r for r in json.loads(path.read_text()) if r["mode"] != args.mode] if path.exists() else []
        path.write_text(json.dumps(kept + results, indent=1) + "\n")
        plot(kept + results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
