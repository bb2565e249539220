"""The two ends of a step on the device, and what it tells the MLPs: which layers run their dense products at all, under each form.

Levels change at the start of a step and at checkpoints, so these two write the flags and no MLP pays a launch for them.
Forms (see forms.py): 0 few, 1 middle, 2 many. L layers, V levels, T tokens.
"""

import triton
import triton.language as tl

from sedac.engine.backends import kinds
from sedac.policy.model import MAX_LEVELS

KIND_FULL, KIND_SKIP, KIND_WIDTH = tl.constexpr(kinds.KIND_FULL), tl.constexpr(kinds.KIND_SKIP), tl.constexpr(kinds.KIND_WIDTH)
DECIDES = tl.constexpr(1)
NUM_LEVELS = tl.constexpr(MAX_LEVELS)


@triton.jit
def find_present(level_ptr, num_tokens, T, CHUNK: tl.constexpr):
    """Return int32 (V,): 1 where a live token of the step has that level."""
    levels_V = tl.arange(0, NUM_LEVELS)
    present_V = tl.zeros([NUM_LEVELS], tl.int32)
    for start in range(0, T, CHUNK):
        t_T = start + tl.arange(0, CHUNK)
        level_T = tl.load(level_ptr + t_T, mask=t_T < num_tokens, other=255).to(tl.int32)
        present_V = tl.maximum(present_V, tl.max((level_T[:, None] == levels_V[None, :]).to(tl.int32), axis=0))
    return present_V


@triton.jit
def write_flags(dense_ptr, repair_ptr, kind_ptr, present_V, whole, L, BLOCK_L: tl.constexpr):
    """Write bool (3, L) twice: whether a layer's dense products run, and whether rows of theirs take the repaired projection."""
    levels_V = tl.arange(0, NUM_LEVELS)
    l_L = tl.arange(0, BLOCK_L)
    is_layer_L = l_L < L
    kind_LV = tl.load(kind_ptr + l_L[:, None] * NUM_LEVELS + levels_V[None, :], mask=is_layer_L[:, None], other=0).to(tl.int32)
    has_LV = present_V[None, :] > 0
    full_L = tl.max((has_LV & (kind_LV == KIND_FULL)).to(tl.int32), axis=1)
    left_L = tl.max((has_LV & (kind_LV != KIND_SKIP)).to(tl.int32), axis=1)
    reduced_L = tl.max((has_LV & (kind_LV > KIND_SKIP)).to(tl.int32), axis=1)
    shorter_L = tl.max((has_LV & ((kind_LV == KIND_SKIP) | (kind_LV == KIND_WIDTH))).to(tl.int32), axis=1)  # rows whose blocks end early
    many_L = tl.maximum((shorter_L == 0).to(tl.int32), whole) * left_L
    tl.store(dense_ptr + l_L, full_L.to(tl.int8), mask=is_layer_L)
    tl.store(dense_ptr + L + l_L, left_L.to(tl.int8), mask=is_layer_L)
    tl.store(dense_ptr + 2 * L + l_L, many_L.to(tl.int8), mask=is_layer_L)
    tl.store(repair_ptr + l_L, (full_L * reduced_L).to(tl.int8), mask=is_layer_L)
    tl.store(repair_ptr + L + l_L, reduced_L.to(tl.int8), mask=is_layer_L)
    tl.store(repair_ptr + 2 * L + l_L, (many_L * reduced_L).to(tl.int8), mask=is_layer_L)


@triton.jit
def _write_idle(live_ptr, dense_ptr, repair_ptr, L, BLOCK_L: tl.constexpr):
    """Let every layer run dense, and no row be reduced."""
    l_L = tl.arange(0, BLOCK_L)
    for form in tl.static_range(3):
        tl.store(dense_ptr + form * L + l_L, (l_L >= 0).to(tl.int8), mask=l_L < L)
        tl.store(repair_ptr + form * L + l_L, (l_L < 0).to(tl.int8), mask=l_L < L)
    tl.store(live_ptr, 0)


@triton.jit(do_not_specialize=["num_tokens", "is_active", "T", "num_sent"])
def begin_kernel(
    level_ptr, role_ptr, goal_ptr, scale_ptr, sent_scale_ptr, sent_ptr, kind_ptr, active_ptr, live_ptr, whole_ptr, dense_ptr, repair_ptr,
    num_tokens, num_sent, is_active, T, L, CHUNK: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Take a step's tokens in; `is_active` 0: every layer runs dense, nothing is reduced. One program.

    The first `num_sent` tokens come from what the host sent: fp32 scales at `sent_scale`, and behind them (in bytes, at `sent`) the floors,
    roles and goals; 0: levels and roles lie in the buffers already.
    """
    if is_active == 0:
        _write_idle(live_ptr, dense_ptr, repair_ptr, L, BLOCK_L)
        return
    if num_sent > 0:
        for start in range(0, num_sent, CHUNK):
            t_T = start + tl.arange(0, CHUNK)
            is_sent_T = t_T < num_sent
            tl.store(scale_ptr + t_T, tl.load(sent_scale_ptr + t_T, mask=is_sent_T, other=0.0), mask=is_sent_T)
            tl.store(level_ptr + t_T, tl.load(sent_ptr + 4 * num_sent + t_T, mask=is_sent_T, other=0), mask=is_sent_T)
            tl.store(role_ptr + t_T, tl.load(sent_ptr + 5 * num_sent + t_T, mask=is_sent_T, other=0), mask=is_sent_T)
            tl.store(goal_ptr + t_T, tl.load(sent_ptr + 6 * num_sent + t_T, mask=is_sent_T, other=0), mask=is_sent_T)
        tl.store(active_ptr, tl.full([], 1, tl.uint8))
        tl.debug_barrier()
    whole = 0
    for start in range(0, T, CHUNK):
        t_T = start + tl.arange(0, CHUNK)
        role_T = tl.load(role_ptr + t_T, mask=t_T < num_tokens, other=1).to(tl.int32)
        level_T = tl.load(level_ptr + t_T, mask=t_T < num_tokens, other=1).to(tl.int32)
        whole = tl.maximum(whole, tl.max(((role_T & DECIDES == 0) & (level_T == 0)).to(tl.int32), axis=0))
    tl.store(live_ptr, num_tokens)
    tl.store(whole_ptr, whole)
    write_flags(dense_ptr, repair_ptr, kind_ptr, find_present(level_ptr, num_tokens, T, CHUNK), whole, L, BLOCK_L)


@triton.jit(do_not_specialize=["num_tokens"])
def end_kernel(
    level_ptr, done_ptr, confidence_ptr, saved_ptr, risk_ptr, active_ptr, counts_ptr, live_ptr, dense_ptr, repair_ptr,
    left_counts_ptr, left_floats_ptr, left_ptr,
    num_tokens, C, L, stride_risk, NUM_COUNTS: tl.constexpr, BLOCK_COUNTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Put what a step left where one copy takes it to the host, and the buffers back to rest; grid: (chunks of tokens,).

    int64 counts from `left` on, which is `left_counts` in bytes; then, from `left_floats` on, fp32 saved (T,) and risks (C, T); then bytes
    done (T,), whose place is counted here: an address that comes with every number of tokens would build a kernel for each alignment.
    """
    left_done_ptr = left_ptr + 8 * NUM_COUNTS + 4 * (C + 1) * num_tokens
    t_T = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    is_token_T = t_T < num_tokens
    zero_T, nothing_T = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.uint8)
    tl.store(left_floats_ptr + t_T, tl.load(saved_ptr + t_T, mask=is_token_T, other=0.0), mask=is_token_T)
    tl.store(left_done_ptr + t_T, tl.load(done_ptr + t_T, mask=is_token_T, other=0), mask=is_token_T)
    tl.store(saved_ptr + t_T, zero_T, mask=is_token_T)
    tl.store(confidence_ptr + t_T, zero_T, mask=is_token_T)
    tl.store(done_ptr + t_T, nothing_T, mask=is_token_T)
    tl.store(level_ptr + t_T, nothing_T, mask=is_token_T)
    for c in range(0, C):
        risk_T = tl.load(risk_ptr + c * stride_risk + t_T, mask=is_token_T, other=0.0)
        tl.store(left_floats_ptr + (c + 1) * num_tokens + t_T, risk_T, mask=is_token_T)
        tl.store(risk_ptr + c * stride_risk + t_T, zero_T + float("nan"), mask=is_token_T)
    if tl.program_id(0) == 0:
        i_N = tl.arange(0, BLOCK_COUNTS)
        tl.store(left_counts_ptr + i_N, tl.load(counts_ptr + i_N, mask=i_N < NUM_COUNTS, other=0), mask=i_N < NUM_COUNTS)
        tl.store(active_ptr, tl.full([], 0, tl.uint8))
        _write_idle(live_ptr, dense_ptr, repair_ptr, L, BLOCK_L)
