"""One row of the steps' table: a whole decoder step under a plan, dense and reduced, checked and timed as it is captured."""

from __future__ import annotations

from typing import Any

import torch
from cases import CONTEXTUAL, Plan, get_plan, get_shape
from held import hold
from measured import DTYPES, get_ceilings, get_device
from mlps import CheckFailed
from model import Decoder
from replay import Replay
from timing import Time, Variant, get_l2_bytes, time_variants
from torch import Tensor

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""relative error of the last stream against float64. In bf16 every layer rounds anew and a score near its threshold takes its neuron along,
so there it only tells a stream that is right from one that is not; what each MLP gives is checked by itself (measured.py, captured.py)."""


def run_row(spec: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """Check one plan of a step against float64, and time it beside the dense step; on a CPU only check.

    Raises:
        CheckFailed: the stream is wrong, or not finite.
    """
    is_check, plan = context["is_check"], get_plan(spec["plan"])
    shape, device = get_shape(spec["shape"], is_tiny=is_check), get_device(context)
    num_tokens, dtype, cache_size = spec["tokens"], DTYPES[spec["dtype"]], spec["cache"]

    def make() -> Decoder:
        layer_bytes = 4 * num_tokens * shape.num_kv_heads * cache_size * shape.head_size
        num_caches = max(2, min(shape.num_layers, -(-4 * get_l2_bytes() // layer_bytes)))
        return Decoder(shape, num_tokens, cache_size, dtype, device, num_caches=num_caches, rank=min(128, shape.hidden_size // 8))

    decoder = hold(("decoder", shape, num_tokens, cache_size, dtype), make)
    decoder.prepare(plan)
    row: dict[str, Any] = {"error": check(decoder, plan, captures=context["captures"])}
    if not is_check:
        times = measure(decoder, context)
        row |= times["dense"].show("dense") | times["ours"].show("ours")
        row |= {"speed-up": times["dense"].median / times["ours"].median, "bound": 1 / decoder.get_bound(plan, get_ceilings(context))}
    elif plan.is_telling and plan.exits_at is not None:
        measure(decoder, context)  # for the code's sake: the interpreter's times say nothing
    return row


def check(decoder: Decoder, plan: Plan, *, captures: bool) -> float | None:
    """Return the relative error of the last stream of the second replay, captured between steps as an engine does; None: too large to tell.

    Raises:
        CheckFailed: it passes the bound of its type, or is not finite.
    """
    decoder.mlps.end()
    replay = Replay(lambda: decoder.run(reduced=True), captures=captures, warm_up=decoder.warm_up)
    decoder.begin()
    replay.run_poisoned()
    out_TD = replay.run_poisoned()[0].double()
    if not bool(out_TD.isfinite().all()):
        raise CheckFailed(f"{decoder.shape.name}, {decoder.num_tokens} tokens, {plan.name}: the stream holds NaN or infinity")
    if not decoder.can_expect:
        return None
    expected_TD = decoder.expect(plan)
    error, bound = float((out_TD - expected_TD).norm() / expected_TD.norm()), BOUNDS[decoder.dtype]
    is_loose = plan.case.level == CONTEXTUAL and decoder.dtype != torch.float32
    if not (error < bound or is_loose):
        raise CheckFailed(f"{decoder.shape.name}, {decoder.num_tokens} tokens, {plan.name}: error {error:.2e} passes {bound:g}")
    return error


def measure(decoder: Decoder, context: dict[str, Any]) -> dict[str, Time]:
    """Time the plan and the dense step in graphs of their own; seconds per step."""

    def run_dense() -> list[Tensor]:
        return decoder.run(reduced=False)

    ours = Variant(run=lambda: decoder.run(reduced=True), warm_up=decoder.warm_up, begin=decoder.begin)
    return time_variants(
        {"dense": Variant(run=run_dense), "ours": ours}, captures=context["captures"], num_rounds=context["rounds"], is_dry=context["is_check"]
    )
