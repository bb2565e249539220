"""A whole decoder step in one CUDA graph, dense against each reduction: the speed-up that a user would see, beside its bound.

    python benchmarks/cuda/step.py --out benchmarks/results/cuda-step         on a GPU: Qwen2.5 3B, 7B and 14B, cache of 1k and 8k
    python benchmarks/cuda/step.py --check                                    anywhere: a tiny decoder under Triton's interpreter

All layers with random bf16 weights (14B: 40 GB with the neuron-major copies), three checkpoints of rank 128, a static KV cache;
embedding, rotary positions, logits and sampling are left out on all sides (model.py). Every plan is checked against float64 on the
tiny decoder and for finite values on the real ones. Times are medians over rounds in which dense and reduced graphs take turns.
`bound` is dense over what bytes and FLOPs leave (data sheet's peaks, as weights between parts); `speed-up` is dense over ours.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import table
from interpreter import use_interpreter

SIZES = ("3B", "7B", "14B")
COLUMNS = ("shape", "tokens", "cache", "plan", "error", "dense us", "ours us", "speed-up", "bound")


def run_checks() -> list[dict[str, Any]]:
    """Run every plan on a tiny decoder in fp32 against float64.

    Raises:
        SystemExit: a stream is wrong.
    """
    import torch
    from cases import TINY
    from model import PLANS, Decoder

    rows = []
    for num_tokens in (1, 5):
        decoder = Decoder(TINY[0], num_tokens, 9, torch.float32, torch.device("cpu"), num_caches=3, rank=8)
        for plan in PLANS:
            decoder.prepare(plan)
            expected_TD = decoder.expect(plan)
            decoder.run(reduced=True)
            out_TD = decoder.run(reduced=True)[0].double()  # as a second replay
            error = float((out_TD - expected_TD).norm() / expected_TD.norm())
            if not error < 1e-4:  # NaN too
                raise SystemExit(f"{plan.name}, {num_tokens} tokens: error {error} passes 1e-4")
            rows.append({"shape": "tiny", "tokens": num_tokens, "cache": 9, "plan": plan.name, "error": error})
            print(table.format_row(COLUMNS, rows[-1]), flush=True)
    return rows


def run_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Capture and time every plan at every shape; returns the table's rows."""
    import torch
    from cases import SHAPES
    from model import PLANS, Decoder
    from timing import capture, get_l2_bytes, require_gpu, time_graphs

    device, rows = require_gpu(), []
    for shape in (s for s in SHAPES if any(s.name.endswith(f"-{size}") for size in arguments.size)):
        for num_tokens in arguments.tokens:
            for cache_size in arguments.cache:
                layer_bytes = 4 * num_tokens * shape.num_kv_heads * cache_size * shape.head_size
                num_caches = max(2, min(shape.num_layers, -(-4 * get_l2_bytes() // layer_bytes)))
                decoder = Decoder(shape, num_tokens, cache_size, torch.bfloat16, device, num_caches=num_caches, rank=128)
                decoder.prepare(PLANS[0])
                dense = capture(lambda decoder=decoder: decoder.run(reduced=False))
                for plan in (p for p in PLANS if re.search(arguments.plan, p.name)):
                    decoder.prepare(plan)
                    for mlp in decoder.mlps.mlps:
                        mlp.compute(decoder.hidden_TD, always=True)
                    decoder.prepare(plan)
                    kept: list[Any] = []
                    ours = capture(lambda decoder=decoder, kept=kept: kept.append(decoder.run(reduced=True)[0]))
                    decoder.prepare(plan)
                    found = time_graphs({"dense": dense, "ours": ours}, num_rounds=arguments.rounds)
                    if not bool(kept[-1].isfinite().all()):
                        raise SystemExit(f"{shape.name}, {num_tokens} tokens, {plan.name}: the stream holds NaN or infinity")
                    row = {"shape": shape.name, "tokens": num_tokens, "cache": cache_size, "plan": plan.name}
                    row |= {"dense us": 1e6 * found["dense"], "ours us": 1e6 * found["ours"], "speed-up": found["dense"] / found["ours"]}
                    rows.append(row | {"bound": 1 / decoder.get_bound(plan)})
                    print(table.format_row(COLUMNS, rows[-1]), flush=True)
                    del ours
                del decoder, dense
                torch.cuda.empty_cache()
    return rows


def main() -> None:
    """Check or time; write the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only check, on a tiny decoder, under Triton's interpreter")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--size", nargs="*", default=SIZES, help="of the models: 0.5B 3B 7B 14B 32B")
    parser.add_argument("--tokens", nargs="*", type=int, default=(1, 16, 256))
    parser.add_argument("--cache", nargs="*", type=int, default=(1024, 8192), help="tokens of each sequence in the cache")
    parser.add_argument("--plan", default="", help="only plans whose name this pattern finds")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if arguments.check:
        use_interpreter()
    print(table.format_header(COLUMNS), flush=True)
    rows = run_checks() if arguments.check else run_all(arguments)
    if arguments.out:
        table.write(arguments.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
