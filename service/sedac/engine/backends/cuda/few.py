"""The MLP of a few rows, none at level `full`: what no row asks for is not read. Two launches.

`gate_up_kernel`: gate, score against the row's threshold, up of the neurons that any row wants. `down_kernel`: down of these.
Blocks of neurons past every row's width return at once, and all blocks do where the layer's own products run instead.
Weights are the model's own (2F, D) gate and up, read in order of importance through `order_F`, and a neuron-major down (F, D).
Partial sums are added in a fixed order by the last block to arrive; atomics count arrivals and active neurons, in integers.
T rows (at most 16), D hidden size, F neurons, K the neurons of a block, V levels.
"""

import triton
import triton.language as tl

from sedac.engine.backends import kinds
from sedac.policy.model import MAX_LEVELS

KIND_FULL, KIND_SKIP = tl.constexpr(kinds.KIND_FULL), tl.constexpr(kinds.KIND_SKIP)
KIND_WIDTH, KIND_CONTEXTUAL = tl.constexpr(kinds.KIND_WIDTH), tl.constexpr(kinds.KIND_CONTEXTUAL)
NUM_LEVELS = tl.constexpr(MAX_LEVELS)


@triton.jit
def activate(x, activation: tl.constexpr):
    """Apply an activation of neurons.ACTIVATIONS: 0 silu, 1 gelu, 2 gelu (tanh); fp32.

    silu is x * sigmoid(x), with the bits of torch.compile's (torch/_decomp/decompositions.py and _inductor/codegen/triton.py, 2.11 and 2.13).
    """
    if activation == 0:
        return x * tl.sigmoid(x)
    if activation == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * inner))  # = 0.5 x (1 + tanh(inner))


@triton.jit
def read_levels(level_ptr, live_ptr, kind_ptr, parameter_ptr, t_T, F):
    """Return kind, parameter and the neurons in reach (T,) of rows; padding of the graph counts as skipped."""
    num_tokens = tl.load(live_ptr)
    level_T = tl.load(level_ptr + t_T, mask=t_T < num_tokens, other=1).to(tl.int32)
    kind_T = tl.load(kind_ptr + level_T).to(tl.int32)
    parameter_T = tl.load(parameter_ptr + level_T)
    limit_T = tl.where(kind_T == KIND_WIDTH, parameter_T.to(tl.int32), tl.where(kind_T == KIND_SKIP, 0, F))
    return kind_T, parameter_T, limit_T


@triton.jit(do_not_specialize=["T"])
def gate_up_kernel(
    x_ptr, gate_up_ptr, order_ptr, scale_ptr, level_ptr, live_ptr, kind_ptr, parameter_ptr, dense_ptr, h_ptr, wanted_ptr, count_ptr,
    T, D, F, stride_x, stride_w,
    ACTIVATION: tl.constexpr, SCORES_ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write h (T, F) in order of importance, fp32, 0 where a row leaves a neuron out; grid: (blocks of neurons,).

    `wanted` (F): the model's own neuron of each place, -1 where no row wants it: one load says where down's row lies and whether it
    is read, so that the next kernel can fetch ahead.
    """
    if tl.load(dense_ptr) != 0:
        return
    t_T = tl.arange(0, BLOCK_T)
    kind_T, parameter_T, limit_T = read_levels(level_ptr, live_ptr, kind_ptr, parameter_ptr, t_T, F)
    limit_T = tl.where(t_T < T, limit_T, 0)
    first = tl.program_id(0) * BLOCK_K
    if first >= tl.max(limit_T, axis=0):
        return
    n_K = first + tl.arange(0, BLOCK_K)
    reach_TK = n_K[None, :] < limit_T[:, None]
    any_K = tl.max(reach_TK.to(tl.int32), axis=0) > 0
    f_K = tl.load(order_ptr + n_K, mask=any_K, other=0).to(tl.int64)
    gate_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for start in range(0, D, BLOCK_D):
        d_D = start + tl.arange(0, BLOCK_D)
        x_TD = tl.load(x_ptr + t_T[:, None] * stride_x + d_D[None, :], mask=(t_T < T)[:, None] & (d_D < D)[None, :], other=0.0)
        w_DK = tl.load(gate_up_ptr + f_K[None, :] * stride_w + d_D[:, None], mask=any_K[None, :] & (d_D < D)[:, None], other=0.0)
        gate_TK = tl.dot(x_TD, w_DK, gate_TK, input_precision="ieee")
    active_TK = activate(gate_TK, ACTIVATION)
    scale_K = tl.load(scale_ptr + n_K, mask=any_K, other=0.0)
    score_TK = tl.abs(active_TK if SCORES_ACTIVATION else gate_TK) * scale_K[None, :]
    keep_TK = reach_TK & ((kind_T != KIND_CONTEXTUAL)[:, None] | (score_TK >= parameter_T[:, None]))
    any_K = tl.max(keep_TK.to(tl.int32), axis=0) > 0
    tl.store(wanted_ptr + n_K, tl.where(any_K, f_K, -1).to(tl.int32), mask=n_K < F)
    up_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    if tl.max(any_K.to(tl.int32), axis=0) > 0:
        for start in range(0, D, BLOCK_D):
            d_D = start + tl.arange(0, BLOCK_D)
            x_TD = tl.load(x_ptr + t_T[:, None] * stride_x + d_D[None, :], mask=(t_T < T)[:, None] & (d_D < D)[None, :], other=0.0)
            w_DK = tl.load(gate_up_ptr + (f_K + F)[None, :] * stride_w + d_D[:, None], mask=any_K[None, :] & (d_D < D)[:, None], other=0.0)
            up_TK = tl.dot(x_TD, w_DK, up_TK, input_precision="ieee")
    h_TK = tl.where(keep_TK, active_TK * up_TK, 0.0)
    tl.store(h_ptr + t_T[:, None] * F + n_K[None, :], h_TK, mask=(t_T < T)[:, None] & (n_K < F)[None, :])
    tl.atomic_add(count_ptr + t_T, tl.sum(keep_TK.to(tl.int32), axis=1), mask=(t_T < T) & (kind_T == KIND_CONTEXTUAL), sem="relaxed")


@triton.jit(do_not_specialize=["T"])
def down_kernel(
    h_ptr, down_ptr, wanted_ptr, level_ptr, live_ptr, kind_ptr, parameter_ptr, dense_ptr, part_ptr, arrived_ptr, count_ptr, saved_ptr, out_ptr,
    T, D, F, PART, stride_out, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write every row of the output (T, D), 0 for skipped ones, and what the rows saved; grid: (blocks of D, parts of F).

    A part has PART neurons, a multiple of BLOCK_K; `arrived` and `count` are 0 between layers.
    """
    if tl.load(dense_ptr) != 0:
        return
    t_T = tl.arange(0, BLOCK_T)
    kind_T, _, limit_T = read_levels(level_ptr, live_ptr, kind_ptr, parameter_ptr, t_T, F)
    limit_T = tl.where(t_T < T, limit_T, 0)
    limit = tl.max(limit_T, axis=0)
    block, part = tl.program_id(0), tl.program_id(1)
    num_parts = tl.maximum(tl.cdiv(limit, PART), 1)
    if part >= num_parts:
        return
    d_D = block * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = d_D < D
    is_row_TD = (t_T < T)[:, None] & in_D[None, :]
    acc_TD = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(part * PART, tl.minimum(limit, (part + 1) * PART), BLOCK_K):
        n_K = start + tl.arange(0, BLOCK_K)
        h_TK = tl.load(h_ptr + t_T[:, None] * F + n_K[None, :], mask=(n_K[None, :] < limit_T[:, None]), other=0.0)
        f_K = tl.load(wanted_ptr + n_K, mask=n_K < limit, other=-1).to(tl.int64)
        w_KD = tl.load(down_ptr + f_K[:, None] * D + d_D[None, :], mask=(f_K >= 0)[:, None] & in_D[None, :], other=0.0)
        acc_TD = tl.dot(h_TK.to(w_KD.dtype), w_KD, acc_TD, input_precision="ieee")
    if num_parts > 1:
        tl.store(part_ptr + (part * T + t_T)[:, None].to(tl.int64) * D + d_D[None, :], acc_TD, mask=is_row_TD)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") != num_parts - 1:
            return
        tl.store(arrived_ptr + block, 0)
        acc_TD = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for i in range(0, num_parts):
            acc_TD += tl.load(part_ptr + (i * T + t_T)[:, None].to(tl.int64) * D + d_D[None, :], mask=is_row_TD, other=0.0, cache_modifier=".cg")
    tl.store(out_ptr + t_T[:, None].to(tl.int64) * stride_out + d_D[None, :], acc_TD.to(out_ptr.dtype.element_ty), mask=is_row_TD)
    if block == 0:
        count_T = tl.load(count_ptr + t_T, mask=t_T < T, other=0).to(tl.float32)
        computed_T = tl.where(kind_T == KIND_CONTEXTUAL, (F + 2 * count_T) / (3.0 * F), limit_T / (1.0 * F))
        live_T = (t_T < T) & (t_T < tl.load(live_ptr))
        tl.store(saved_ptr + t_T, tl.load(saved_ptr + t_T, mask=live_T, other=0.0) + 1.0 - computed_T, mask=live_T)
        tl.store(count_ptr + t_T, tl.zeros([BLOCK_T], tl.int32), mask=t_T < T)
