"""One row of the kernels' table: a case of the reduced MLP at a shape, right against float64 and timed, both as it is captured."""

from __future__ import annotations

from typing import Any

import torch
from cases import DATA_SHEET, FORMS, SKIP, Case, Ceilings, Shape, get_case, get_shape
from held import hold
from mlps import CheckFailed, Mlps, run_dense
from replay import Replay
from timing import Time, Variant, get_l2_bytes, time_variants
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def get_device(context: dict[str, Any]) -> torch.device:
    """Return where the rows run: the CPU where they are only checked."""
    return torch.device("cpu" if context["is_check"] else "cuda")


def get_ceilings(context: dict[str, Any]) -> Ceilings:
    """Return the card's ceilings, or the data sheet's where none were measured."""
    if "bytes per second" not in context:
        return DATA_SHEET
    return Ceilings(bytes_per_second=context["bytes per second"], flops_per_second=context["flops per second"])


def run_row(spec: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """Check one case on fresh inputs, and time it beside the dense MLP; on a CPU only check.

    Raises:
        CheckFailed: a row is wrong, or holds what was never written.
    """
    shape, case = get_shape(spec["shape"], is_tiny=context["is_check"]), get_case(spec["case"])
    dtype, device, num_tokens = DTYPES[spec["dtype"]], get_device(context), spec["tokens"]
    repaired = spec.get("repaired", False)
    mlps = hold(("mlps", shape, dtype, repaired), lambda: make_mlps(shape, dtype, device, repaired=repaired))
    form = FORMS.index(spec["form"]) if spec.get("form") else None
    x_NTD = [torch.randn(num_tokens, shape.hidden_size, device=device).to(dtype) for _ in mlps.weights]
    mlps.prepare(case, x_NTD, form)
    row: dict[str, Any] = {"form": FORMS[mlps.mlps[0].choose_form(num_tokens)]}
    row["error"] = check(mlps, case, x_NTD, captures=context["captures"])
    if not context["is_check"]:
        times = measure(mlps, case, x_NTD, context)
        dense, ours = times["dense"].median, times["ours"].median
        ideal = dense * case.get_ideal(shape, num_tokens, get_ceilings(context))
        row |= times["dense"].show("dense") | times["ours"].show("ours") | {"ideal us": 1e6 * ideal, "ours / dense": ours / dense}
        row["reached"] = (dense - ours) / (dense - ideal) if ideal < dense else None
    elif case.is_telling and case.level == SKIP:
        measure(mlps, case, x_NTD, context)  # for the code's sake: the interpreter's times say nothing
    mlps.end()
    return row


def make_mlps(shape: Shape, dtype: torch.dtype, device: torch.device, *, repaired: bool) -> Mlps:
    """Make as many MLPs as pass the L2 several times; on a CPU two."""
    size = 3 * shape.hidden_size * shape.num_neurons * dtype.itemsize
    return Mlps(shape, 2 if device.type == "cpu" else max(4, -(-4 * get_l2_bytes() // size)), dtype, device, repaired=repaired)


def warm_up(mlps: Mlps, x_NTD: list[Tensor]) -> None:
    """Launch whatever a graph of this size may launch, between two steps."""
    mlps.end()
    for mlp, x_TD in zip(mlps.mlps, x_NTD, strict=True):
        mlp.compute(x_TD, always=True)


def check(mlps: Mlps, case: Case, x_NTD: list[Tensor], *, captures: bool) -> float:
    """Run one case in poisoned memory, captured between steps as an engine does; return the largest relative error of a row.

    Raises:
        CheckFailed: a row is wrong, or holds what was never written.
    """
    levels = case.get_levels(len(x_NTD[0]))
    mlps.end()
    replay = Replay(
        lambda: [mlp.compute(x_TD) for mlp, x_TD in zip(mlps.mlps, x_NTD, strict=True)], captures=captures, warm_up=lambda: warm_up(mlps, x_NTD)
    )
    mlps.begin(levels)
    where = f"{mlps.shape.name}, {len(levels)} tokens, {case.name}, {mlps.dtype}"
    outputs = replay.run_poisoned()
    return max(mlps.check(layer, x_TD, levels, out_TD, where) for layer, (x_TD, out_TD) in enumerate(zip(x_NTD, outputs, strict=True)))


def measure(mlps: Mlps, case: Case, x_NTD: list[Tensor], context: dict[str, Any]) -> dict[str, Time]:
    """Time a case and the dense MLP in graphs of their own; seconds per MLP."""
    levels = case.get_levels(len(x_NTD[0]))

    def run_ours() -> list[Tensor]:
        return [mlp.compute(x_TD) for mlp, x_TD in zip(mlps.mlps, x_NTD, strict=True)]

    def run_plain() -> list[Tensor]:
        return [run_dense(x_TD, gate_up=gate_up, down=down) for (gate_up, down, _), x_TD in zip(mlps.weights, x_NTD, strict=True)]

    ours = Variant(run=run_ours, warm_up=lambda: warm_up(mlps, x_NTD), begin=lambda: mlps.begin(levels))
    found = time_variants(
        {"dense": Variant(run=run_plain), "ours": ours}, captures=context["captures"], num_rounds=context["rounds"], is_dry=context["is_check"]
    )
    if not all(time.median > 0 for time in found.values()):
        raise CheckFailed(f"{mlps.shape.name}, {case.name}: a time of 0 was measured")
    return {name: time.per(len(mlps.weights)) for name, time in found.items()}
