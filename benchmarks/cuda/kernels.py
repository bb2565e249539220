"""Every form of the reduced MLP, and the checkpoint, at real models' shapes: right against float64, and timed inside CUDA graphs.

    python benchmarks/cuda/kernels.py --out benchmarks/results/cuda-kernels     on a GPU: check and time, row by row
    python benchmarks/cuda/kernels.py --check                                   anywhere: tiny shapes under Triton's interpreter
    python benchmarks/cuda/kernels.py --shape 7B --tokens 1 16 --form few --seconds 60

Needs torch, Triton, numpy and pydantic. Rows run in a process of their own and are written to OUT.jsonl one by one (runner.py); OUT.json and
OUT.md follow at the end. Each row captures its graph between two steps, poisons its outputs, replays it and compares with float64.
Then it is timed: a graph holds as many MLPs of one shape as pass the L2 several times, so that every one finds its weights in memory,
and repeats them until a replay takes a millisecond; a time is a replay's over their number, the median, least and largest of rounds in
which dense and reduced graphs take turns. `dense` is the vendor's library with one launch for the activation, in a graph of its own.
`ideal` shortens it as bytes or FLOPs do, whichever rule by the card's own ceilings (cases.py). `reached` = (dense - ours) / (dense - ideal).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path

import planning
from cases import FORMS, SHAPES
from runner import Interrupted, Runner


def add_arguments(
    parser: argparse.ArgumentParser, *, seconds: float = math.inf, out: str = "write OUT.jsonl row by row, OUT.json, OUT.md and OUT.log"
) -> None:
    """Add what every benchmark here takes."""
    parser.add_argument("--check", action="store_true", help="only check, on tiny shapes, under Triton's interpreter")
    parser.add_argument("--out", type=Path, help=out)
    parser.add_argument("--eager", action="store_true", help="capture nothing: times have the host's own among them")
    parser.add_argument("--seconds", type=float, default=seconds, help="of the whole: no row is begun afterwards, and those left out are named")
    parser.add_argument("--row-seconds", type=float, help="of one row, weights and compilation among them; then it is given up: 60, with --check 600")
    parser.add_argument("--rounds", type=int, default=15, help="in which what is timed takes turns")


_NEEDED = ("torch", "triton", "numpy", "pydantic")


def make_runner(out: Path | None, arguments: argparse.Namespace) -> Runner:
    """Return a runner as the arguments say.

    Raises:
        SystemExit: this Python lacks a package.
    """
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"this Python lacks {', '.join(missing)}; carry what is missing and put its folder on PYTHONPATH (docs/gpu.md)")
    row_seconds = arguments.row_seconds or (600.0 if arguments.check else 60.0)  # an interpreter on a busy machine is slow, and does not hang
    return Runner(
        out, is_check=arguments.check, is_eager=arguments.eager, seconds=arguments.seconds, row_seconds=row_seconds, rounds=arguments.rounds
    )


def run_to_the_end(runner: Runner, specs: list[planning.Row]) -> int:
    """Run a plan, write the files whatever happens, and return the exit status."""
    left_out = specs
    with runner:
        try:
            runner.prepare(planning.PREPARATION)
            left_out = runner.run(specs)
        except Interrupted as error:
            runner.note_interrupt(error)
            left_out = [spec for spec in runner.pending if spec not in planning.PREPARATION] or specs
        return runner.finish(left_out)


def main() -> None:
    """Plan and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--shape", nargs="*", help="parts of the names of shapes")
    parser.add_argument("--tokens", nargs="*", type=int)
    parser.add_argument("--form", choices=FORMS, help="this form for all numbers of tokens; default: the engine's choice")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repaired", action="store_true", help="reduced levels have a down projection of their own")
    parser.add_argument("--swaps", type=int, help="default: 10000, with --check 40")
    arguments = parser.parse_args()
    if arguments.check:
        forms = (arguments.form,) if arguments.form else FORMS
        specs = planning.plan_kernel_checks(arguments.tokens or (1, 5, 33), arguments.tokens or (1, 3, 20), forms)
    else:
        shapes = [s.name for s in SHAPES if not arguments.shape or any(n in s.name for n in arguments.shape)]
        more = {"form": arguments.form, "repaired": arguments.repaired}
        specs = planning.plan_kernels(shapes, arguments.tokens or planning.TOKENS, dtype=arguments.dtype, **more)
    specs += planning.plan_swaps(arguments.swaps or (40 if arguments.check else 10000))
    sys.exit(run_to_the_end(make_runner(arguments.out, arguments), specs))


if __name__ == "__main__":
    main()
