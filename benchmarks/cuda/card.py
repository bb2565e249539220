"""The first of two commands for a machine with a GPU and little time: what the card reaches, whether what is captured is right, how fast it is.

    python benchmarks/cuda/card.py --out DIR --seconds 300        on a GPU, then: python benchmarks/cuda/engine.py --out DIR --seconds 300
    python benchmarks/cuda/card.py --check                        anywhere: a dry run on tiny shapes under Triton's interpreter

Needs torch, Triton, numpy and pydantic, no network and no vLLM. In this order, each part until its share of the time is spent: the card and its
ceilings, IF nodes (if they fail, all that follows is launched eagerly, and says so), captured graphs against float64, kernels at 7B, one
decoder step at 7B, kernels at 0.5B and 70B/TP8, swaps. What time is left goes to rows that were left out. Every row is printed and
written to DIR/card.jsonl as soon as it is there; DIR/card.json and DIR/card.md follow at the end, on an interrupt too; DIR/card.log has
what failed rows printed. The exit status is 1 where a row failed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import planning
import table
from kernels import add_arguments, make_runner
from planning import Row
from runner import Interrupted, Runner


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows that share a piece of the time."""

    name: str
    rows: list[Row]
    until: float
    """No row of it is begun after this share of the whole."""


def make_parts() -> list[Part]:
    """Return the parts in their order, the most telling rows of each first."""
    small, middle = "Qwen2.5-0.5B", "Qwen2.5-7B"
    captured = planning.plan_captured(small, "bfloat16", weights=("levels", "plain", "other", "own"))
    captured += planning.plan_captured_checkpoints(small, "bfloat16", (1, 16, 200, 256))
    captured += planning.plan_captured(small, "bfloat16", weights=("repaired",))
    captured += planning.plan_captured(middle, "bfloat16", weights=("levels",))
    captured += planning.plan_captured_checkpoints(small, "float32", (5, 64))
    captured += planning.plan_captured(small, "float16", weights=("levels",)) + planning.plan_captured(small, "float32", weights=("levels",))
    others = [planning.plan_kernels([name], planning.TELLING_TOKENS) for name in (small, "Llama-3-70B/TP8")]
    return [
        Part(name="captured graphs", rows=captured, until=0.33),
        Part(name="kernels at 7B", rows=planning.plan_kernels([middle]), until=0.58),
        Part(name="a decoder step at 7B", rows=planning.plan_steps([middle], (1, 16), (1024,)), until=0.77),
        Part(name="kernels at 0.5B and 70B/TP8", rows=[row for rows in others for row in rows], until=0.92),
        Part(name="swaps", rows=planning.plan_swaps(2000), until=0.97),
    ]


def shrink(part: Part) -> Part:
    """Return a part for a dry run: a row of every kind, on tiny shapes, which the interpreter can do in seconds."""
    rows, seen = [], set()
    for row in part.rows:
        form = row.get("form") or planning.find_form(row.get("tokens", 0))
        tiny = row | {"tokens": {"few": min(row["tokens"], 2), "middle": 5, "many": 20}[form]} if "tokens" in row else dict(row)
        kind: tuple[object, ...] = (row["part"], form)
        if row["part"] == "captured checkpoints":
            tiny["tokens"], kind = 17, (row["part"],)
        if row["part"] == "captured":
            kind = (row["weights"], form if row["weights"] == "levels" else "")
        if row["part"] == "kernels":
            tiny["form"], kind = form, (row["shape"], form)
        if row["part"] == "probe":
            kind = (row["part"], row["shape"])
        if row["part"] == "step":
            tiny |= {"cache": 9, "dtype": "float32"}
            kind = (row["tokens"], row["plan"].startswith("skip from"))
        if row["part"] == "swaps":
            tiny["swaps"] = 4
        if kind not in seen:
            rows.append(tiny)
        seen.add(kind)
    return Part(name=part.name, rows=rows, until=part.until)


def run_parts(runner: Runner, parts: list[Part], seconds: float) -> list[Row]:
    """Run all parts, then what they left out; return the rows that were not done."""
    left_out: list[Row] = []
    waiting = list(parts)
    try:
        print(table.format_header(table.COLUMNS["card"]), flush=True)
        runner.prepare(planning.PREPARATION)
        while waiting:
            part = waiting[0]
            print(f"\n# {part.name}", flush=True)
            waiting.pop(0)
            left_out += runner.run(part.rows, until=part.until * seconds)
            runner.write()
        if left_out:
            print("\n# left out before", flush=True)
            again, left_out = left_out, []
            left_out = list(runner.run(again))
    except Interrupted as error:
        runner.note_interrupt(error)
        left_out += [row for row in runner.pending if row not in planning.PREPARATION and row not in left_out]
    return left_out + [row for part in waiting for row in part.rows]


def main() -> None:
    """Plan and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, seconds=300.0, out="folder for card.jsonl, card.json, card.md and card.log")
    arguments = parser.parse_args()
    parts = [shrink(part) for part in make_parts()] if arguments.check else make_parts()
    out = arguments.out / "card" if arguments.out else None
    with make_runner(out, arguments) as runner:
        sys.exit(runner.finish(run_parts(runner, parts, arguments.seconds)))


if __name__ == "__main__":
    main()
