"""The MLP of many rows, the skipped ones left out and the narrow ones ended early; no host knows how many are left.

Grids are sized for all rows: blocks past the list of rows, or past the width of their rows, return at once. Rows are the fastest axis: the
blocks that read the same weights run side by side, so these come from memory once, and from the L2 for the others. Each row's sum has a
fixed order, so its result does not depend on which rows share its step; atomics count arrivals alone.
Rows at level `full` are computed here too, rounded another way than the layer's own products: steps with tokens that were
promised those run them instead (flags.py).
M rows of a block, D hidden size, F neurons, N columns of a block, K of the summed dimension.
"""

import triton
import triton.language as tl

from sedac.engine.backends.cuda.few import KIND_CONTEXTUAL, activate, read_levels


@triton.jit
def _read_rows(index_ptr, bounds_ptr, level_ptr, live_ptr, kind_ptr, parameter_ptr, first, F, BLOCK_M: tl.constexpr):
    """Return rows (M,), -1 where none, their kind, parameter and neurons in reach."""
    m_M = first + tl.arange(0, BLOCK_M)
    row_M = tl.load(index_ptr + m_M, mask=m_M < tl.load(bounds_ptr + 1), other=-1)
    safe_M = tl.maximum(row_M, 0)
    kind_M, parameter_M, limit_M = read_levels(level_ptr, live_ptr, kind_ptr, parameter_ptr, safe_M, F)
    return row_M, kind_M, parameter_M, tl.where(row_M >= 0, limit_M, 0)


@triton.jit
def grouped_gate_up_kernel(
    x_ptr, gate_up_ptr, order_ptr, scale_ptr, index_ptr, bounds_ptr, level_ptr, live_ptr, kind_ptr, parameter_ptr, dense_ptr, h_ptr,
    D, F, stride_x, stride_w, ACTIVATION: tl.constexpr, SCORES_ACTIVATION: tl.constexpr, HAS_NEURONS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write h (M, F) of the listed rows; full rows in the model's own order of neurons, reduced ones by importance.

    Grid: (rows, F).
    """
    if tl.load(dense_ptr) != 0:
        return
    first, begin = tl.program_id(0) * BLOCK_M, tl.load(bounds_ptr)
    if first >= tl.load(bounds_ptr + 1):
        return
    row_M, kind_M, parameter_M, limit_M = _read_rows(index_ptr, bounds_ptr, level_ptr, live_ptr, kind_ptr, parameter_ptr, first, F, BLOCK_M)
    if tl.program_id(1) * BLOCK_N >= tl.max(limit_M, axis=0):
        return
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_N = n_N < F
    f_N = n_N
    if HAS_NEURONS:
        if first >= begin:
            f_N = tl.load(order_ptr + n_N, mask=in_N, other=0)
    f_N = f_N.to(tl.int64)
    is_row_M = row_M >= 0
    x_M_ptr = x_ptr + tl.maximum(row_M, 0).to(tl.int64) * stride_x
    gate_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        d_K = start + tl.arange(0, BLOCK_K)
        in_K = d_K < D
        x_MK = tl.load(x_M_ptr[:, None] + d_K[None, :], mask=is_row_M[:, None] & in_K[None, :], other=0.0)
        gate_KN = tl.load(gate_up_ptr + f_N[None, :] * stride_w + d_K[:, None], mask=in_K[:, None] & in_N[None, :], other=0.0)
        gate_MN = tl.dot(x_MK, gate_KN, gate_MN, input_precision="ieee")
        up_KN = tl.load(gate_up_ptr + (f_N + F)[None, :] * stride_w + d_K[:, None], mask=in_K[:, None] & in_N[None, :], other=0.0)
        up_MN = tl.dot(x_MK, up_KN, up_MN, input_precision="ieee")
    active_MN = activate(gate_MN, ACTIVATION)
    keep_MN = n_N[None, :] < limit_M[:, None]
    if HAS_NEURONS:
        if first >= begin:
            score_MN = tl.abs(active_MN if SCORES_ACTIVATION else gate_MN) * tl.load(scale_ptr + n_N, mask=in_N, other=0.0)[None, :]
            keep_MN = keep_MN & ((kind_M != KIND_CONTEXTUAL)[:, None] | (score_MN >= parameter_M[:, None]))
    h_MN = tl.where(keep_MN, active_MN * up_MN, 0.0).to(h_ptr.dtype.element_ty)
    m_M = first + tl.arange(0, BLOCK_M)
    tl.store(h_ptr + m_M[:, None].to(tl.int64) * F + n_N[None, :], h_MN, mask=is_row_M[:, None] & in_N[None, :])


@triton.jit
def grouped_down_kernel(
    h_ptr, own_ptr, neurons_ptr, order_ptr, index_ptr, bounds_ptr, level_ptr, live_ptr, kind_ptr, parameter_ptr, dense_ptr,
    part_ptr, arrived_ptr, out_ptr, D, F, PART, NUM_ROWS, stride_own, stride_out,
    HAS_NEURONS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the listed rows of the output (T, D): full ones by the model's own down (D, F), reduced ones by the neuron-major (F, D).

    Grid: (rows, D, parts of F). A part has PART neurons, a multiple of BLOCK_K; the last to arrive adds the parts (parts, NUM_ROWS, D).
    """
    if tl.load(dense_ptr) != 0:
        return
    first, begin = tl.program_id(0) * BLOCK_M, tl.load(bounds_ptr)
    if first >= tl.load(bounds_ptr + 1):
        return
    row_M, _, _, limit_M = _read_rows(index_ptr, bounds_ptr, level_ptr, live_ptr, kind_ptr, parameter_ptr, first, F, BLOCK_M)
    limit = tl.max(limit_M, axis=0)
    part, num_parts = tl.program_id(2), tl.maximum(tl.cdiv(limit, PART), 1)
    if part >= num_parts:
        return
    low, high = part * PART, tl.minimum(limit, (part + 1) * PART)
    m_M = first + tl.arange(0, BLOCK_M)
    d_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_N = d_N < D
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    is_own = first < begin
    if is_own:
        for start in range(low, high, BLOCK_K):
            n_K = start + tl.arange(0, BLOCK_K)
            h_MK = tl.load(h_ptr + m_M[:, None].to(tl.int64) * F + n_K[None, :], mask=n_K[None, :] < limit_M[:, None], other=0.0)
            w_KN = tl.load(own_ptr + d_N[None, :].to(tl.int64) * stride_own + n_K[:, None], mask=(n_K < F)[:, None] & in_N[None, :], other=0.0)
            acc_MN = tl.dot(h_MK, w_KN, acc_MN, input_precision="ieee")
    if HAS_NEURONS:
        if not is_own:
            for start in range(low, high, BLOCK_K):
                n_K = start + tl.arange(0, BLOCK_K)
                f_K = tl.load(order_ptr + n_K, mask=n_K < F, other=0).to(tl.int64)
                h_MK = tl.load(h_ptr + m_M[:, None].to(tl.int64) * F + n_K[None, :], mask=n_K[None, :] < limit_M[:, None], other=0.0)
                w_KN = tl.load(neurons_ptr + f_K[:, None] * D + d_N[None, :], mask=(n_K < F)[:, None] & in_N[None, :], other=0.0)
                acc_MN = tl.dot(h_MK, w_KN, acc_MN, input_precision="ieee")
    if num_parts > 1:
        place_MN = m_M[:, None].to(tl.int64) * D + d_N[None, :]
        tl.store(part_ptr + part.to(tl.int64) * NUM_ROWS * D + place_MN, acc_MN, mask=in_N[None, :])
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), 1, sem="acq_rel") != num_parts - 1:
            return
        tl.store(arrived_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), 0)
        acc_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in range(0, num_parts):
            acc_MN += tl.load(part_ptr + tl.cast(i, tl.int64) * NUM_ROWS * D + place_MN, mask=in_N[None, :], other=0.0, cache_modifier=".cg")
    row_ptr = out_ptr + tl.maximum(row_M, 0)[:, None].to(tl.int64) * stride_out + d_N[None, :]
    tl.store(row_ptr, acc_MN.to(out_ptr.dtype.element_ty), mask=(row_M >= 0)[:, None] & in_N[None, :])
