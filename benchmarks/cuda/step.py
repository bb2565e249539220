"""A whole decoder step in one CUDA graph, dense against each reduction: the speed-up that a user would see, beside its bound.

    python benchmarks/cuda/step.py --out benchmarks/results/cuda-step         on a GPU: Qwen2.5 7B, 3B and 14B, cache of 1k and 8k
    python benchmarks/cuda/step.py --check                                    anywhere: a tiny decoder under Triton's interpreter

Needs torch, Triton, numpy and pydantic. All layers with random bf16 weights (14B: 40 GB with the neuron-major copies), three checkpoints of rank
128, a static KV cache; embedding, rotary positions, logits and sampling are left out on all sides (model.py). Every row's graph is
captured between two steps and its last stream compared with float64, closely in fp32 (--check) and coarsely in bf16 (stepped.py). Times
are medians over rounds in which dense and reduced graphs take turns. `bound` is dense over what bytes and FLOPs leave by the card's own
ceilings; `speed-up` is dense over ours.
"""

from __future__ import annotations

import argparse
import sys

import planning
from cases import SHAPES, TINY
from kernels import add_arguments, make_runner, run_to_the_end

SIZES = ("7B", "3B", "14B")


def main() -> None:
    """Plan and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--size", nargs="*", default=SIZES, help="of the models: 0.5B 3B 7B 14B 32B")
    parser.add_argument("--tokens", nargs="*", type=int, default=(1, 16, 256))
    parser.add_argument("--cache", nargs="*", type=int, default=(1024, 8192), help="tokens of each sequence in the cache")
    parser.add_argument("--plan", default="", help="only plans whose name has this part")
    arguments = parser.parse_args()
    if arguments.check:
        specs = planning.plan_steps([TINY.name], (1, 5), (9,), dtype="float32", pattern=arguments.plan)
    else:
        shapes = [s.name for s in SHAPES if any(s.name.endswith(f"-{size}") for size in arguments.size)]
        specs = planning.plan_steps(shapes, arguments.tokens, arguments.cache, pattern=arguments.plan)
    sys.exit(run_to_the_end(make_runner(arguments.out, arguments), specs))


if __name__ == "__main__":
    main()
