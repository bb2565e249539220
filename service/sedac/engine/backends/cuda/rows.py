"""Small kernels around the products: activate and mask, clear skipped rows, take repaired ones, list the rows that are left.

T rows, D hidden size, F neurons, V levels.
"""

import triton
import triton.language as tl

from sedac.engine.backends.cuda.few import KIND_CONTEXTUAL, KIND_FULL, KIND_SKIP, KIND_WIDTH, activate, read_levels


@triton.jit
def activation_kernel(
    gate_up_ptr, h_ptr, rank_ptr, scale_ptr, level_ptr, live_ptr, kind_ptr, parameter_ptr, saved_ptr,
    F, stride_g, ACTIVATION: tl.constexpr, SCORES_ACTIVATION: tl.constexpr, HAS_NEURONS: tl.constexpr, MASKS_ONLY: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Write h (T, F) = act(gate) * up of the products (T, 2F), 0 where a reduced row leaves a neuron out; count what skips save.

    Grid: (rows, blocks of F). `rank_F`: a neuron's place in the order of importance. Rounded once, at the end, as the compiler's fused form is.
    `MASKS_ONLY`: vLLM's own activation kernel has written h, which rounds in between; only what is left out is cleared.
    """
    t = tl.program_id(0)
    kind, parameter, limit = read_levels(level_ptr, live_ptr, kind_ptr, parameter_ptr, t, F)
    is_live = t < tl.load(live_ptr)
    if MASKS_ONLY:
        if (kind == KIND_FULL) | (is_live == 0):
            return
    f_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_F = f_F < F
    row_ptr = gate_up_ptr + t.to(tl.int64) * stride_g + f_F
    place_ptr = h_ptr + t.to(tl.int64) * F + f_F
    gate_F = tl.load(row_ptr, mask=in_F, other=0.0).to(tl.float32)
    active_F = activate(gate_F, ACTIVATION)
    if MASKS_ONLY:
        h_F = tl.load(place_ptr, mask=in_F, other=0.0).to(tl.float32)
    else:
        h_F = active_F * tl.load(row_ptr + F, mask=in_F, other=0.0).to(tl.float32)
    if is_live:
        if kind == KIND_SKIP:
            h_F = tl.zeros([BLOCK_F], tl.float32)
            if tl.program_id(1) == 0:
                tl.store(saved_ptr + t, tl.load(saved_ptr + t) + 1.0)
        if HAS_NEURONS:
            if kind == KIND_CONTEXTUAL:
                source_F = active_F if SCORES_ACTIVATION else gate_F
                h_F = tl.where(tl.abs(source_F) * tl.load(scale_ptr + f_F, mask=in_F, other=0.0) >= parameter, h_F, 0.0)
            elif kind == KIND_WIDTH:
                h_F = tl.where(tl.load(rank_ptr + f_F, mask=in_F, other=0) < limit, h_F, 0.0)
    tl.store(place_ptr, h_F.to(h_ptr.dtype.element_ty), mask=in_F)


@triton.jit
def finish_kernel(
    out_ptr, level_ptr, live_ptr, kind_ptr, parameter_ptr, saved_ptr, dense_ptr, active_ptr,
    D, stride_out, AFTER_DENSE: tl.constexpr, COUNTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Clear skipped rows of the output (T, D), padding among them; grid: (rows, blocks of D).

    `AFTER_DENSE`: also where the layer's own products ran; `COUNTS`: add what skips save.
    """
    if tl.load(active_ptr) == 0:
        return
    if not AFTER_DENSE:
        if tl.load(dense_ptr) != 0:
            return
    t = tl.program_id(0)
    kind, _, _ = read_levels(level_ptr, live_ptr, kind_ptr, parameter_ptr, t, D)
    if kind != KIND_SKIP:
        return
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(out_ptr + t.to(tl.int64) * stride_out + d_D, tl.zeros([BLOCK_D], out_ptr.dtype.element_ty), mask=d_D < D)
    if COUNTS:
        if (tl.program_id(1) == 0) & (t < tl.load(live_ptr)):
            tl.store(saved_ptr + t, tl.load(saved_ptr + t) + 1.0)


@triton.jit
def merge_kernel(out_ptr, repaired_ptr, level_ptr, live_ptr, kind_ptr, parameter_ptr, D, stride_out, stride_repaired, BLOCK_D: tl.constexpr):
    """Put reduced rows of the repaired result into the output (T, D); grid: (rows, blocks of D)."""
    t = tl.program_id(0)
    kind, _, _ = read_levels(level_ptr, live_ptr, kind_ptr, parameter_ptr, t, D)
    if kind <= KIND_SKIP:
        return
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    value_D = tl.load(repaired_ptr + t.to(tl.int64) * stride_repaired + d_D, mask=d_D < D, other=0.0)
    tl.store(out_ptr + t.to(tl.int64) * stride_out + d_D, value_D, mask=d_D < D)


@triton.jit(do_not_specialize=["T"])
def compact_kernel(
    level_ptr, live_ptr, kind_ptr, parameter_ptr, falling_ptr, dense_ptr, index_ptr, bounds_ptr, saved_ptr,
    T, F, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """List the rows that are left, -1 between: full ones, then from a multiple of BLOCK_M on reduced ones, widest first. One program.

    `falling` (V): levels by falling width; writes `index`, and `bounds` (2): where the reduced begin and where all end, and counts
    what skips and widths save.
    """
    if tl.load(dense_ptr) != 0:
        return
    t_T = tl.arange(0, BLOCK_T)
    live_T = t_T < tl.minimum(tl.load(live_ptr), T)
    level_T = tl.load(level_ptr + t_T, mask=live_T, other=1).to(tl.int32)
    kind_T, _, limit_T = read_levels(level_ptr, live_ptr, kind_ptr, parameter_ptr, t_T, F)
    full_T = (live_T & (kind_T == KIND_FULL)).to(tl.int32)
    num_full = tl.sum(full_T, axis=0)
    begin = tl.cdiv(num_full, BLOCK_M) * BLOCK_M
    at_T = tl.arange(0, BLOCK_T)
    tl.store(index_ptr + at_T, tl.full([BLOCK_T], -1, tl.int32))
    tl.store(index_ptr + BLOCK_T + tl.arange(0, BLOCK_M), tl.full([BLOCK_M], -1, tl.int32))
    tl.debug_barrier()
    tl.store(index_ptr + tl.cumsum(full_T, axis=0) - 1, t_T, mask=full_T != 0)
    end = begin
    for i in tl.static_range(16):
        mine_T = (live_T & (kind_T > KIND_SKIP) & (level_T == tl.load(falling_ptr + i))).to(tl.int32)
        tl.store(index_ptr + end + tl.cumsum(mine_T, axis=0) - 1, t_T, mask=mine_T != 0)
        end += tl.sum(mine_T, axis=0)
    tl.store(bounds_ptr, begin)
    tl.store(bounds_ptr + 1, end)
    computed_T = limit_T / (1.0 * F)
    tl.store(saved_ptr + t_T, tl.load(saved_ptr + t_T, mask=live_T, other=0.0) + 1.0 - computed_T, mask=live_T)
