"""What a step tells the MLPs on the device: which layers run their dense products at all, under each form.

Levels change at the start of a step and at checkpoints, so these two write the flags and no MLP pays a launch for them.
Forms (see forms.py): 0 few, 1 middle, 2 many. L layers, V levels, T tokens.
"""

import triton
import triton.language as tl

KIND_FULL, KIND_SKIP = tl.constexpr(0), tl.constexpr(1)
DECIDES = tl.constexpr(1)
NUM_LEVELS = tl.constexpr(16)


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
    shorter_L = tl.max((has_LV & ((kind_LV == 1) | (kind_LV == 2))).to(tl.int32), axis=1)  # rows whose blocks end early
    many_L = tl.maximum((shorter_L == 0).to(tl.int32), whole) * left_L
    tl.store(dense_ptr + l_L, full_L.to(tl.int8), mask=is_layer_L)
    tl.store(dense_ptr + L + l_L, left_L.to(tl.int8), mask=is_layer_L)
    tl.store(dense_ptr + 2 * L + l_L, many_L.to(tl.int8), mask=is_layer_L)
    tl.store(repair_ptr + l_L, (full_L * reduced_L).to(tl.int8), mask=is_layer_L)
    tl.store(repair_ptr + L + l_L, reduced_L.to(tl.int8), mask=is_layer_L)
    tl.store(repair_ptr + 2 * L + l_L, (many_L * reduced_L).to(tl.int8), mask=is_layer_L)


@triton.jit(do_not_specialize=["num_tokens", "is_active", "T"])
def begin_kernel(
    level_ptr, role_ptr, kind_ptr, live_ptr, whole_ptr, dense_ptr, repair_ptr,
    num_tokens, is_active, T, L, CHUNK: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Take a step's tokens in; `is_active` 0: every layer runs dense, nothing is reduced. One program."""
    if is_active == 0:
        l_L = tl.arange(0, BLOCK_L)
        for form in tl.static_range(3):
            tl.store(dense_ptr + form * L + l_L, (l_L >= 0).to(tl.int8), mask=l_L < L)
            tl.store(repair_ptr + form * L + l_L, (l_L < 0).to(tl.int8), mask=l_L < L)
        tl.store(live_ptr, 0)
        return
    whole = 0
    for start in range(0, T, CHUNK):
        t_T = start + tl.arange(0, CHUNK)
        role_T = tl.load(role_ptr + t_T, mask=t_T < num_tokens, other=1).to(tl.int32)
        level_T = tl.load(level_ptr + t_T, mask=t_T < num_tokens, other=1).to(tl.int32)
        whole = tl.maximum(whole, tl.max(((role_T & DECIDES == 0) & (level_T == 0)).to(tl.int32), axis=0))
    tl.store(live_ptr, num_tokens)
    tl.store(whole_ptr, whole)
    write_flags(dense_ptr, repair_ptr, kind_ptr, find_present(level_ptr, num_tokens, T, CHUNK), whole, L, BLOCK_L)
