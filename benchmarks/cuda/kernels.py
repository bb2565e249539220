"""Every form of the reduced MLP, and the checkpoint, at real models' shapes: right against float64, and timed inside CUDA graphs.

    python benchmarks/cuda/kernels.py --out benchmarks/results/cuda-kernels     on a GPU: check, then time; a table and .json
    python benchmarks/cuda/kernels.py --check                                   anywhere: tiny shapes under Triton's interpreter
    python benchmarks/cuda/kernels.py --shape 7B --tokens 1 16 --form few

Outputs and scratch are poisoned with NaN before each check; inputs are fresh. A graph holds as many MLPs of one shape as pass the
L2 several times, so every one of them finds its weights in memory; a time is a replay's over their number, the median over rounds
in which dense and reduced graphs take turns. `dense` is the vendor's library with one launch for the activation, in a graph of its
own. `ideal` shortens it as bytes or FLOPs do, whichever rule (cases.py). `reached` = (dense - ours) / (dense - ideal).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import table
from interpreter import use_interpreter

TOKENS = (1, 4, 16, 64, 256)
BOUNDS = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
"""relative error against float64"""
COLUMNS = ("shape", "tokens", "case", "form", "error", "dense us", "ours us", "ideal us", "ours / dense", "reached")


def check(mlps: Any, case: Any, num_tokens: int, form: int | None) -> float:
    """Run one case on fresh inputs with poisoned memory; return the largest relative error of a row.

    Raises:
        SystemExit: a row is wrong, or holds what was never written.
    """
    import torch

    x_TD = torch.randn(num_tokens, mlps.shape.hidden_size, device=mlps.device).to(mlps.dtype)
    levels, worst = case.get_levels(num_tokens), 0.0
    mlps.prepare(case, x_TD, form)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN then
    try:
        outputs = [mlp.compute(x_TD) for mlp in mlps.mlps]
    finally:
        torch.use_deterministic_algorithms(False)
    for layer, out_TD in enumerate(outputs):
        expected_TD, slack_T = mlps.expect(layer, x_TD, levels)
        bound = BOUNDS[str(mlps.dtype).removeprefix("torch.")]
        distance_T, norm_T = (out_TD.double() - expected_TD).norm(dim=1), expected_TD.norm(dim=1).clamp(min=1e-6)
        if not bool((distance_T <= bound * norm_T + slack_T).all()):  # false for NaN too
            raise SystemExit(
                f"{mlps.shape.name}, {num_tokens} tokens, {case.name}, {mlps.dtype}: errors {(distance_T / norm_T).tolist()} pass {bound}"
            )
        worst = max(worst, float(((distance_T - slack_T).clamp(min=0) / norm_T).max()))
    return worst


def measure(mlps: Any, case: Any, num_tokens: int, form: int | None, num_rounds: int) -> dict[str, float]:
    """Time a case and the dense MLP in graphs of their own; seconds per MLP."""
    import torch
    from cases import run_dense
    from timing import capture, time_graphs

    x_NTD = [torch.randn(num_tokens, mlps.shape.hidden_size, device=mlps.device).to(mlps.dtype) for _ in mlps.weights]
    mlps.prepare(case, x_NTD[0], form)

    def run_ours() -> None:
        for mlp, x_TD in zip(mlps.mlps, x_NTD, strict=True):
            mlp.compute(x_TD)

    def run_plain() -> None:
        for (gate_up, down, _), x_TD in zip(mlps.weights, x_NTD, strict=True):
            run_dense(x_TD, gate_up=gate_up, down=down)

    for mlp in mlps.mlps:
        mlp.compute(x_NTD[0], always=True)
    mlps.begin(case.get_levels(num_tokens))  # `always` has counted and computed whatever there is
    found = time_graphs({"dense": capture(run_plain), "ours": capture(run_ours)}, num_rounds=num_rounds)
    return {name: seconds / len(mlps.weights) for name, seconds in found.items()}


def run_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Check and, on a GPU, time every case; returns the table's rows."""
    import torch
    from cases import CASES, SHAPES, TINY, Mlps, get_form_name
    from checkpoints import check_probe, measure_probe
    from sedac.engine.cuda import forms
    from timing import get_l2_bytes, require_gpu

    device = torch.device("cpu") if arguments.check else require_gpu()
    shapes = TINY if arguments.check else [s for s in SHAPES if not arguments.shape or any(n in s.name for n in arguments.shape)]
    dtypes = [torch.float32, torch.float16, torch.bfloat16] if arguments.check else [getattr(torch, arguments.dtype)]
    chosen = None if arguments.form is None else forms.NAMES.index(arguments.form)
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for dtype in dtypes:
            size = 3 * shape.hidden_size * shape.num_neurons * dtype.itemsize
            count = 2 if arguments.check else max(4, -(-4 * get_l2_bytes() // size))
            mlps = Mlps(shape, count, dtype, device, repaired=arguments.repaired or arguments.check)
            for num_tokens in arguments.tokens or ((1, 5, 33) if arguments.check else TOKENS):
                named = [chosen] if chosen is not None or not arguments.check else [forms.FEW, forms.MIDDLE, forms.MANY]
                for case in CASES:
                    for form in named:
                        error = check(mlps, case, num_tokens, form)
                        row = {"shape": shape.name, "dtype": str(dtype), "tokens": num_tokens, "case": case.name, "error": error}
                        row["form"] = get_form_name(mlps.mlps[0].choose_form(num_tokens))
                        if not arguments.check:
                            times = measure(mlps, case, num_tokens, form, arguments.rounds)
                            dense, ours, ideal = times["dense"], times["ours"], times["dense"] * case.get_ideal(shape, num_tokens)
                            reached = (dense - ours) / (dense - ideal) if ideal < dense else None
                            row |= {
                                "dense us": 1e6 * dense,
                                "ours us": 1e6 * ours,
                                "ideal us": 1e6 * ideal,
                                "ours / dense": ours / dense,
                                "reached": reached,
                            }
                        rows.append(row)
                        print(table.format_row(COLUMNS, row), flush=True)
            for num_tokens in arguments.tokens or ((1, 3, 20) if arguments.check else TOKENS):
                error = check_probe(shape, num_tokens, dtype, device)
                row = {"shape": shape.name, "dtype": str(dtype), "tokens": num_tokens, "case": "probe + rule", "error": error}
                if not arguments.check:
                    row["ours us"] = 1e6 * measure_probe(shape, num_tokens, dtype, device, num_rounds=arguments.rounds)
                    dense = next((r["dense us"] for r in rows if r["shape"] == shape.name and r["tokens"] == num_tokens and "dense us" in r), None)
                    row |= {"dense us": dense, "ours / dense": row["ours us"] / dense if dense else None}
                rows.append(row)
                print(table.format_row(COLUMNS, row), flush=True)
            del mlps
    return rows


def main() -> None:
    """Check, time, swap; write the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only check, on tiny shapes, under Triton's interpreter")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--shape", nargs="*", help="parts of the names of shapes")
    parser.add_argument("--tokens", nargs="*", type=int)
    parser.add_argument("--form", choices=("few", "middle", "many"), help="this form for all numbers of tokens; default: the engine's choice")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(BOUNDS))
    parser.add_argument("--repaired", action="store_true", help="reduced levels have a down projection of their own")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--swaps", type=int, help="default: 10000, with --check 40")
    arguments = parser.parse_args()
    if arguments.check:
        use_interpreter()
    print(table.format_header(COLUMNS), flush=True)
    rows = run_all(arguments)
    from swaps import run_swaps

    swaps = run_swaps(arguments.swaps or (40 if arguments.check else 10000), on_gpu=not arguments.check)
    print(f"swaps: {swaps['swaps']} between passes, {swaps['mixed']} mixed, {swaps['late']} late, {swaps['moved']} buffers moved")
    if arguments.out:
        table.write(arguments.out, COLUMNS, rows, swaps=swaps)
    if swaps["mixed"] or swaps["late"] or swaps["moved"]:
        raise SystemExit("swaps: a pass saw parts of two policies, or a policy that was replaced")


if __name__ == "__main__":
    main()
