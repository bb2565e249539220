"""The checkpoint on the device: probe and decision rule for every token of the step in one launch.

The same rule as kernels/checkpoint.cpp and sedac/probe/cascade.py. Programs project a part of the stream of a few tokens on a few rows of
the probe; the last of a token block to arrive adds the parts and makes risks of them, the last of all decides, so levels are written once
and in a fixed order.
Atomics count arrivals only; every sum has a fixed order, so equal inputs of one graph give equal bits on every rank.
T tokens, D hidden size, R rank, V levels, S parts of D.
"""

import triton
import triton.language as tl

from sedac.engine.backends.cuda.flags import NUM_LEVELS, find_present, write_flags

SOFT, OBSERVED, OF_CANDIDATE = tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)
DECIDES = tl.constexpr(1)
NORM_EPSILON = tl.constexpr(1e-5)


@triton.jit
def _find_seen(role_ptr, done_ptr, t_T, live_T, side: tl.constexpr, rank, is_on):
    """Return bool (T,): the tokens of a side whose risk is asked for."""
    role_T = tl.load(role_ptr + t_T, mask=live_T, other=0).to(tl.int32)
    done_T = tl.load(done_ptr + t_T, mask=live_T, other=1).to(tl.int32)
    mine_T = ((role_T & OF_CANDIDATE) != 0) if side == 1 else ((role_T & OF_CANDIDATE) == 0)
    decides_T = ((role_T & DECIDES) != 0) & (done_T < is_on)
    return live_T & mine_T & (t_T * 0 < rank) & (decides_T | ((role_T & OBSERVED) != 0))


@triton.jit
def _project(
    hidden_ptr, residual_ptr, down_ptr, z_ptr, t_T, seen_T, r_R, rank, stride_h, stride_r, low, high, D, MAX_RANK,
    HAS_RESIDUAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write z (T, R) = stream (T, low..high) @ down.T of the seen tokens, in fp32; low and high - low are multiples of BLOCK_D, or high is D."""
    acc_TR = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(low, high, BLOCK_D):
        d_D = start + tl.arange(0, BLOCK_D)
        read_TD = seen_T[:, None] & (d_D < D)[None, :]
        x_TD = tl.load(hidden_ptr + t_T[:, None].to(tl.int64) * stride_h + d_D[None, :], mask=read_TD, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x_TD += tl.load(residual_ptr + t_T[:, None].to(tl.int64) * stride_r + d_D[None, :], mask=read_TD, other=0.0).to(tl.float32)
        w_RD = tl.load(down_ptr + r_R[:, None] * D + d_D[None, :], mask=(r_R < rank)[:, None] & (d_D < D)[None, :], other=0.0)
        if BLOCK_T == 1:
            acc_TR += tl.sum(x_TD * w_RD, axis=1)[None, :]
        else:
            acc_TR = tl.dot(x_TD, tl.trans(w_RD), acc_TR, input_precision="ieee")
    tl.store(z_ptr + t_T[:, None] * MAX_RANK + r_R[None, :], acc_TR, mask=seen_T[:, None] & (r_R < rank)[None, :])


@triton.jit
def _write_risk(
    z_ptr, risk_ptr, norm_weight_ptr, norm_bias_ptr, out_weight_ptr, out_bias_ptr, t_N, seen_N, rank, MAX_RANK, num_splits, stride_z,
    ROWS: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """Write the risk of the seen tokens: softplus of the logit of the normed projection, whose parts are added up first to last."""
    r_R = tl.arange(0, BLOCK_RANK)
    in_R = r_R < rank
    z_NR = tl.zeros([ROWS, BLOCK_RANK], tl.float32)
    for s in range(0, num_splits):
        place_NR = z_ptr + s * stride_z + t_N[:, None] * MAX_RANK + r_R[None, :]
        z_NR += tl.load(place_NR, mask=seen_N[:, None] & in_R[None, :], other=0.0, cache_modifier=".cg")
    mean_N = tl.sum(z_NR, axis=1) / rank
    centred_NR = tl.where(in_R[None, :], z_NR - mean_N[:, None], 0.0)
    inverse_N = 1.0 / tl.sqrt(tl.sum(centred_NR * centred_NR, axis=1) / rank + NORM_EPSILON)
    weight_R = tl.load(norm_weight_ptr + r_R, mask=in_R, other=0.0)
    bias_R = tl.load(norm_bias_ptr + r_R, mask=in_R, other=0.0)
    out_R = tl.load(out_weight_ptr + r_R, mask=in_R, other=0.0)
    logit_N = tl.sum((centred_NR * inverse_N[:, None] * weight_R[None, :] + bias_R[None, :]) * out_R[None, :], axis=1) + tl.load(out_bias_ptr)
    # Softplus through exp(-abs): log(1 + e) loses what is small beside 1, so below 1e-3 the series takes over.
    e_N = tl.exp(-tl.abs(logit_N))
    log1p_N = tl.where(e_N < 1e-3, e_N * (1 - e_N * (0.5 - e_N * (1.0 / 3))), tl.log(1 + e_N))
    risk_N = tl.where(logit_N == logit_N, tl.maximum(logit_N, 0.0) + log1p_N, logit_N)
    tl.store(risk_ptr + t_N, risk_N, mask=seen_N)


@triton.jit
def _decide(
    level_ptr, role_ptr, done_ptr, goal_ptr, scale_ptr, confidence_ptr, risk_ptr, sure_ptr, ladder_ptr, shares_ptr,
    knobs0_ptr, knobs1_ptr, counts0_ptr, counts1_ptr, rules_ptr, rank0, rank1, num_tokens, T, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the levels of the confident tokens, and count; two passes, since scope `batch` must know all before it takes one."""
    threshold0, weight0, target0 = tl.load(knobs0_ptr), tl.load(knobs0_ptr + 1), tl.load(knobs0_ptr + 2)
    threshold1, weight1, target1 = tl.load(knobs1_ptr), tl.load(knobs1_ptr + 1), tl.load(knobs1_ptr + 2)
    rule0, batch0, decay0 = tl.load(rules_ptr), tl.load(rules_ptr + 1), tl.load(rules_ptr + 2)
    rule1, batch1, decay1 = tl.load(rules_ptr + 3), tl.load(rules_ptr + 4), tl.load(rules_ptr + 5)
    threshold0, threshold1 = tl.where(rank0 > 0, threshold0, 0.0), tl.where(rank1 > 0, threshold1, 0.0)
    unsure0, unsure1, decided0, decided1, confident0, confident1 = 0, 0, 0, 0, 0, 0
    for start in range(0, T, CHUNK):
        t_T = start + tl.arange(0, CHUNK)
        live_T = t_T < num_tokens
        role_T = tl.load(role_ptr + t_T, mask=live_T, other=0).to(tl.int32)
        is1_T = (role_T & OF_CANDIDATE) != 0
        threshold_T = tl.where(is1_T, threshold1, threshold0)
        done_T = tl.load(done_ptr + t_T, mask=live_T, other=1).to(tl.int32)
        decides_T = live_T & ((role_T & DECIDES) != 0) & (done_T == 0) & (threshold_T > 0)
        risk_T = tl.load(risk_ptr + t_T, mask=decides_T, other=float("nan"), cache_modifier=".cg")
        limit_T = threshold_T * tl.load(scale_ptr + t_T, mask=decides_T, other=1.0)
        sure_T = risk_T < limit_T  # false for NaN
        before_T = tl.load(confidence_ptr + t_T, mask=decides_T, other=0.0)
        now_T = tl.where(sure_T, (limit_T - risk_T) / limit_T, 0.0)
        after_T = before_T * tl.where(is1_T, decay1, decay0) + now_T * tl.where(is1_T, weight1, weight0)
        accumulates_T = tl.where(is1_T, rule1, rule0) > 0
        tl.store(confidence_ptr + t_T, after_T, mask=decides_T & accumulates_T)
        sure_T = decides_T & tl.where(accumulates_T, after_T >= tl.where(is1_T, target1, target0), sure_T)
        tl.store(sure_ptr + t_T, sure_T.to(tl.int8), mask=t_T < T)
        decided0 += tl.sum((decides_T & ~is1_T).to(tl.int32), axis=0)
        decided1 += tl.sum((decides_T & is1_T).to(tl.int32), axis=0)
        unsure0 += tl.sum((decides_T & ~sure_T & ~is1_T).to(tl.int32), axis=0)
        unsure1 += tl.sum((decides_T & ~sure_T & is1_T).to(tl.int32), axis=0)
    blocked0, blocked1 = tl.where(batch0 > 0, unsure0, 0), tl.where(batch1 > 0, unsure1, 0)
    tl.debug_barrier()
    for start in range(0, T, CHUNK):
        t_T = start + tl.arange(0, CHUNK)
        live_T = t_T < num_tokens
        role_T = tl.load(role_ptr + t_T, mask=live_T, other=0).to(tl.int32)
        is1_T = (role_T & OF_CANDIDATE) != 0
        blocked_T = tl.where(is1_T, blocked1, blocked0) > 0
        sure_T = live_T & (tl.load(sure_ptr + t_T, mask=live_T, other=0) != 0) & ~blocked_T
        goal_T = tl.load(goal_ptr + t_T, mask=sure_T, other=0).to(tl.int32)
        level_T = tl.load(level_ptr + t_T, mask=sure_T, other=0).to(tl.int32)
        soft_T = (role_T & SOFT) != 0
        confidence_T = tl.load(confidence_ptr + t_T, mask=sure_T, other=0.0)
        ratio_T = 1.0 / (1.0 + tl.exp(2.0 - 4.0 * confidence_T))  # = tanh(2C - 1) / 2 + 1/2
        picked_T, open_T = tl.zeros([CHUNK], tl.int32), sure_T & soft_T
        for i in tl.static_range(16):
            step_T = tl.load(ladder_ptr + goal_T * NUM_LEVELS + i, mask=open_T, other=255).to(tl.int32)
            open_T = open_T & (step_T != 255)
            share_T = tl.load(shares_ptr + step_T, mask=open_T, other=2.0)
            picked_T = tl.where(open_T & (share_T <= ratio_T), step_T, picked_T)
        wanted_T = tl.where(soft_T, picked_T, goal_T)
        more_T = tl.load(shares_ptr + wanted_T, mask=sure_T, other=0.0) > tl.load(shares_ptr + level_T, mask=sure_T, other=0.0)
        level_T = tl.where(more_T, wanted_T, level_T)
        tl.store(level_ptr + t_T, level_T.to(tl.uint8), mask=sure_T)
        final_T = sure_T & (~soft_T | (level_T == goal_T))
        tl.store(done_ptr + t_T, tl.full([CHUNK], 1, tl.uint8), mask=final_T)
        confident0 += tl.sum((final_T & ~is1_T).to(tl.int32), axis=0)
        confident1 += tl.sum((final_T & is1_T).to(tl.int32), axis=0)
    tl.store(counts0_ptr, tl.load(counts0_ptr) + decided0)
    tl.store(counts0_ptr + 1, tl.load(counts0_ptr + 1) + confident0)
    tl.store(counts1_ptr, tl.load(counts1_ptr) + decided1)
    tl.store(counts1_ptr + 1, tl.load(counts1_ptr + 1) + confident1)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["T"])  # a new number of tokens must not wait for the compiler
def checkpoint_kernel(
    hidden_ptr, residual_ptr, level_ptr, role_ptr, done_ptr, goal_ptr, scale_ptr, confidence_ptr, risk_ptr, active_ptr, live_ptr,
    ladder_ptr, shares_ptr, down0_ptr, norm_weight0_ptr, norm_bias0_ptr, out_weight0_ptr, out_bias0_ptr, rank0_ptr, knobs0_ptr, counts0_ptr,
    down1_ptr, norm_weight1_ptr, norm_bias1_ptr, out_weight1_ptr, out_bias1_ptr, rank1_ptr, knobs1_ptr, counts1_ptr,
    rules_ptr, z_ptr, sure_ptr, arrived_ptr, kind_ptr, whole_ptr, dense_ptr, repair_ptr,
    T, D, L, MAX_RANK, stride_h, stride_r, stride_z,
    HAS_RESIDUAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_RANK: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Grid: (token blocks, rank blocks, parts of D). `arrived` (token blocks + 1) is 0 between launches; `z` is (S, T, MAX_RANK)."""
    if tl.load(active_ptr) == 0:
        return
    block, num_blocks, num_splits = tl.program_id(0), tl.num_programs(0), tl.num_programs(2)
    num_parts = tl.num_programs(1) * num_splits
    length = tl.cdiv(tl.cdiv(D, BLOCK_D), num_splits) * BLOCK_D
    low = tl.program_id(2) * length
    high = tl.minimum(low + length, D)
    part_ptr = z_ptr + tl.program_id(2) * stride_z
    num_tokens = tl.minimum(tl.load(live_ptr), T)
    rank0, rank1 = tl.load(rank0_ptr).to(tl.int32), tl.load(rank1_ptr).to(tl.int32)
    is_on0, is_on1 = tl.where(tl.load(knobs0_ptr) > 0, 1, 0), tl.where(tl.load(knobs1_ptr) > 0, 1, 0)
    t_T = block * BLOCK_T + tl.arange(0, BLOCK_T)
    r_R = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    seen0_T = _find_seen(role_ptr, done_ptr, t_T, t_T < num_tokens, 0, rank0, is_on0)
    seen1_T = _find_seen(role_ptr, done_ptr, t_T, t_T < num_tokens, 1, rank1, is_on1)
    has0, has1 = tl.max(seen0_T.to(tl.int32), axis=0) > 0, tl.max(seen1_T.to(tl.int32), axis=0) > 0
    if has0 & (tl.program_id(1) * BLOCK_R < rank0):
        _project(
            hidden_ptr, residual_ptr, down0_ptr, part_ptr, t_T, seen0_T, r_R, rank0, stride_h, stride_r, low, high, D, MAX_RANK,
            HAS_RESIDUAL, BLOCK_T, BLOCK_R, BLOCK_D,
        )  # fmt: skip
    if has1 & (tl.program_id(1) * BLOCK_R < rank1):
        _project(
            hidden_ptr, residual_ptr, down1_ptr, part_ptr, t_T, seen1_T, r_R, rank1, stride_h, stride_r, low, high, D, MAX_RANK,
            HAS_RESIDUAL, BLOCK_T, BLOCK_R, BLOCK_D,
        )  # fmt: skip
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") != num_parts - 1:
        return
    tl.store(arrived_ptr + block, 0)
    for start in range(0, BLOCK_T, ROWS):
        t_N = block * BLOCK_T + start + tl.arange(0, ROWS)
        if has0:
            seen0_N = _find_seen(role_ptr, done_ptr, t_N, t_N < num_tokens, 0, rank0, is_on0)
            _write_risk(
                z_ptr, risk_ptr, norm_weight0_ptr, norm_bias0_ptr, out_weight0_ptr, out_bias0_ptr, t_N, seen0_N, rank0, MAX_RANK,
                num_splits, stride_z, ROWS, BLOCK_RANK,
            )  # fmt: skip
        if has1:
            seen1_N = _find_seen(role_ptr, done_ptr, t_N, t_N < num_tokens, 1, rank1, is_on1)
            _write_risk(
                z_ptr, risk_ptr, norm_weight1_ptr, norm_bias1_ptr, out_weight1_ptr, out_bias1_ptr, t_N, seen1_N, rank1, MAX_RANK,
                num_splits, stride_z, ROWS, BLOCK_RANK,
            )  # fmt: skip
    tl.debug_barrier()
    if num_blocks > 1:
        if tl.atomic_add(arrived_ptr + num_blocks, 1, sem="acq_rel") != num_blocks - 1:
            return
        tl.store(arrived_ptr + num_blocks, 0)
    _decide(
        level_ptr, role_ptr, done_ptr, goal_ptr, scale_ptr, confidence_ptr, risk_ptr, sure_ptr, ladder_ptr, shares_ptr,
        knobs0_ptr, knobs1_ptr, counts0_ptr, counts1_ptr, rules_ptr, rank0, rank1, num_tokens, T, CHUNK,
    )  # fmt: skip
    write_flags(dense_ptr, repair_ptr, kind_ptr, find_present(level_ptr, num_tokens, T, CHUNK), tl.load(whole_ptr).to(tl.int32), L, BLOCK_L)
