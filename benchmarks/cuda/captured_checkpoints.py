"""Checkpoints in a captured graph: risks against float64, and decisions and counts against the plain torch form on the CPU.

T tokens, C checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cases import get_shape
from checkpoints import get_risk, make_state
from measured import DTYPES, get_device
from mlps import CheckFailed
from replay import Replay, poison_scratch
from sedac.engine.backends.tokens import DECIDES, OBSERVED, OF_CANDIDATE, Tokens
from sedac.engine.backends.torch import TorchBackend
from sedac.engine.step.state import State
from sedac.policy.model import Candidate, Checkpoint, Policy, Rule, Scope
from torch import Tensor

LAYERS = (0, 1)
NEVER_SURE, ALWAYS_SURE = 1e-30, 1e9
SLACK, TIE = 1e-3, 1e-4
"""how near to its limit a risk may lie (relative), and a confidence to its target, for rounding not to decide"""
TARGETS = tuple(0.3 + 0.01 * i for i in range(20))
"""Targets of accumulated confidence, of which the first that no token lies on is taken."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One step: what its policy does at the two checkpoints, and the roles that its tokens take in turn."""

    name: str
    thresholds: tuple[float | None, float | None]
    """One for each checkpoint. None stands for one that about half of the tokens pass."""
    roles: tuple[int, ...] = (DECIDES,)
    rule: Rule = "first"
    scope: Scope = "token"
    candidate: tuple[float, float] | None = None
    """Thresholds of a roll-out's candidate, for tokens of its side."""
    is_padded: bool = False


SCENES = (
    Scene(name="half at each", thresholds=(None, None)),
    Scene(name="none", thresholds=(NEVER_SURE, NEVER_SURE)),
    Scene(name="all at the first", thresholds=(ALWAYS_SURE, ALWAYS_SURE)),
    Scene(name="half at each, padded", thresholds=(None, None), is_padded=True),
    Scene(name="some watched, some promised", thresholds=(None, None), roles=(DECIDES, OBSERVED, 0)),
    Scene(name="whole batch or none", thresholds=(None, ALWAYS_SURE), scope="batch", is_padded=True),
    Scene(name="accumulated", thresholds=(None, None), rule="accumulate"),
    Scene(name="a candidate beside", thresholds=(None, NEVER_SURE), roles=(DECIDES, DECIDES | OF_CANDIDATE), candidate=(NEVER_SURE, ALWAYS_SURE)),
    Scene(name="all at the second", thresholds=(NEVER_SURE, ALWAYS_SURE)),
)


def run_row(spec: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """Check the graph of two checkpoints for one number of rows and type of the stream.

    Raises:
        CheckFailed: a risk, a level or a count is wrong, or the second replay of a step gave other bits.
    """
    shape, device, num_rows = get_shape(spec["shape"], is_tiny=context["is_check"]), get_device(context), spec["tokens"]
    rank = 16 if context["is_check"] else 128
    ours = make_state(shape, LAYERS, device, rank=rank)
    plain = make_plain(ours)
    streams = [torch.randn(num_rows, shape.hidden_size, device=device).to(DTYPES[spec["dtype"]]) for _ in range(2 * len(LAYERS))]

    def run() -> tuple[Tensor, ...]:
        for layer, hidden_TD, residual_TD in zip(LAYERS, streams[::2], streams[1::2], strict=True):
            ours.observe(layer, hidden_TD, residual_TD)
        return ()

    replay, worst = Replay(run, captures=context["captures"]), 0.0
    num_replays = 2 if context["captures"] else 1  # what runs anew each time has one order of sums
    for scene in SCENES:
        for stream_TD in streams:
            stream_TD.copy_(torch.randn_like(stream_TD, dtype=torch.float32))
        live = max(1, num_rows - num_rows // 3) if scene.is_padded else num_rows
        for stream_TD in streams:
            stream_TD[live:] = math.nan
        where = f"{shape.name}, {spec['dtype']}, {num_rows} rows, checkpoints, {scene.name}"
        worst = max(worst, check_scene(ours, plain, scene, streams, live, replay, where, num_replays=num_replays))
    return {"replays": num_replays * len(SCENES), "error": worst}


def make_plain(ours: State) -> State:
    """Return a state on the CPU with the same probes, which decides in plain torch."""
    probes = {layer: ours.stable.probes[i].probe for i, layer in enumerate(ours.layout.checkpoint_layers)}
    copies = {layer: type(probe)(*reversed(probe.down.weight.shape)).requires_grad_(False) for layer, probe in probes.items() if probe is not None}
    for layer, copy in copies.items():
        copy.load_state_dict({name: tensor.cpu() for name, tensor in probes[layer].state_dict().items()})  # type: ignore[union-attr]
    cpu = torch.device("cpu")
    table = type(ours.table)(ours.layout.num_layers, (), (), 1, cpu)
    return State(ours.layout, copies, table, max_num_tokens=ours.level_T.shape[0], device=cpu, make_backend=TorchBackend)


def check_scene(ours: State, plain: State, scene: Scene, streams: list[Tensor], live: int, replay: Replay, where: str, *, num_replays: int) -> float:
    """Run one step on both states, so often on the one that is captured; return the largest relative error of a risk.

    Raises:
        CheckFailed: see `run_row`.
    """
    risks = [get_risk(ours, i, streams[2 * i][:live], streams[2 * i + 1][:live]) for i in range(len(LAYERS))]
    thresholds = [find_gap(risk_T) if t is None else t for t, risk_T in zip(scene.thresholds, risks, strict=True)]
    roles = np.array([scene.roles[t % len(scene.roles)] for t in range(live)], dtype=np.uint8)
    tokens = Tokens(
        role_T=roles, floor_T=np.zeros(live, dtype=np.uint8), goal_T=np.ones(live, dtype=np.uint8),
        scale_T=np.ones(live, dtype=np.float32), tier_T=np.zeros(live, dtype=np.int64),
    )  # fmt: skip
    for target in TARGETS:
        policy = make_policy(scene, thresholds, target)
        candidate = scene.candidate and Candidate(rollout=7, share=0.5, policy=make_policy(scene, scene.candidate, target))
        wanted, counted, num_ties = run_plain(plain, policy, candidate, tokens, streams, target)
        if not num_ties:
            break
    else:
        raise CheckFailed(f"{where}: confidences lie on every target tried; draw others")
    ours.apply(policy, 1, candidate)
    seen: list[dict[str, Tensor]] = []
    for _ in range(num_replays):
        before = [side.counts_C2.clone() for side in (ours.stable, ours.candidate)]
        poison_scratch(ours)
        ours.begin_step(live, tokens)
        replay.run_poisoned()
        seen.append(_read(ours, live))
        changed = [(side.counts_C2 - b).cpu() for side, b in zip((ours.stable, ours.candidate), before, strict=True)]
        ours.end_step()
        if not all(torch.equal(a, b) for a, b in zip(changed, counted, strict=True)):
            raise CheckFailed(f"{where}: counts {[c.tolist() for c in changed]}, in plain torch {[c.tolist() for c in counted]}")
    for name, found in seen[0].items():
        if not torch.equal(torch.nan_to_num(found, -1.0), torch.nan_to_num(seen[-1][name], -1.0)):
            raise CheckFailed(f"{where}: {name} has other bits the second time")
        if name in ("level_T", "done_T") and not torch.equal(found, wanted[name]):
            raise CheckFailed(f"{where}: {name} is {found.tolist()}, in plain torch {wanted[name].tolist()}")
    return _compare_risks(seen[0]["risk_CT"].double(), torch.stack(risks).cpu(), wanted["risk_CT"], where)


def run_plain(
    plain: State, policy: Policy, candidate: Candidate | None, tokens: Tokens, streams: list[Tensor], target: float
) -> tuple[dict[str, Tensor], list[Tensor], int]:
    """Run a step in plain torch; return what it leaves, what each side counts, and how many confidences lie on the target."""
    live, num_ties = len(tokens.role_T), 0
    plain.apply(policy, 1, candidate)
    before = [side.counts_C2.clone() for side in (plain.stable, plain.candidate)]
    plain.begin_step(live, tokens)
    for i, layer in enumerate(LAYERS):
        if plain.is_active:
            plain.observe(layer, (streams[2 * i].float() + streams[2 * i + 1].float()).cpu())
        num_ties += int(((plain.buffers.confidence_T[:live] - target).abs() < TIE).sum()) if policy.rule == "accumulate" else 0
    wanted = _read(plain, live)
    plain.end_step()
    return wanted, [side.counts_C2 - b for side, b in zip((plain.stable, plain.candidate), before, strict=True)], num_ties


def make_policy(scene: Scene, thresholds: Sequence[float], target: float) -> Policy:
    """Return a scene's policy; `target`: the confidence to accumulate."""
    checkpoints = tuple(Checkpoint(layer=layer, threshold=t, weight=1.0, target=target) for layer, t in zip(LAYERS, thresholds, strict=True))
    return Policy(enabled=True, checkpoints=checkpoints, rule=scene.rule, scope=scene.scope, decay=0.5)


def find_gap(risk_T: Tensor) -> float:
    """Return a threshold that about half of the risks pass, in the widest gap between two of the middle ones.

    Raises:
        CheckFailed: none of the gaps is wide enough for rounding not to decide.
    """
    sorted_T = risk_T.sort().values
    if len(sorted_T) == 1:
        return float(sorted_T[0]) * 2
    low, high = len(sorted_T) // 4, max(len(sorted_T) // 4 + 2, len(sorted_T) - len(sorted_T) // 4)
    middle_T = sorted_T[low:high]
    gap_T = middle_T[1:] / middle_T[:-1]
    at = int(gap_T.argmax())
    if float(gap_T[at]) < 1 + 2 * SLACK:
        raise CheckFailed(f"{len(sorted_T)} random risks lie closer than {2 * SLACK:g}: no threshold tells them apart; draw others")
    return float((middle_T[at] * middle_T[at + 1]).sqrt())


def _read(state: State, live: int) -> dict[str, Tensor]:
    b = state.buffers
    return {
        "level_T": b.level_T[:live].cpu().clone(), "done_T": b.done_T[:live].cpu().clone(),
        "confidence_T": b.confidence_T[:live].cpu().clone(), "risk_CT": b.risk_CT[:, :live].cpu().clone(),
    }  # fmt: skip


def _compare_risks(found_CT: Tensor, expected_CT: Tensor, plain_CT: Tensor, where: str) -> float:
    """Return the largest relative error of the risks that were asked for.

    Raises:
        CheckFailed: it passes 1e-4, or others were evaluated.
    """
    asked_CT = ~plain_CT.isnan()
    if not torch.equal(asked_CT, ~found_CT.isnan()):
        raise CheckFailed(f"{where}: {int((~found_CT.isnan()).sum())} risks were evaluated, in plain torch {int(asked_CT.sum())}")
    error = ((found_CT - expected_CT).abs() / expected_CT)[asked_CT]
    worst = float(error.max()) if error.numel() else 0.0
    if not worst < 1e-4:
        raise CheckFailed(f"{where}: a risk is off by {worst:.1e}")
    return worst
