"""Swaps of thresholds and probes between passes: each pass must run under the very policy that was put into force before it.

Two checkpoints, two policies with probes of their own. A pass under either leaves the risks of its probes and the levels of its
thresholds; a pass that mixed them, or ran under the one before, leaves others. On a GPU the pass is one captured graph.
"""

from __future__ import annotations

from typing import Any

import torch
from cases import TINY
from checkpoints import begin, get_risk, make_state
from measured import get_device
from mlps import CheckFailed
from replay import Replay
from sedac.engine.backends.cuda.backend import CudaBackend
from sedac.policy.model import Checkpoint, Policy
from sedac.probe.probe import LREProbe

LAYERS = (0, 1)


def run_row(spec: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """Swap so often between passes.

    Raises:
        CheckFailed: a pass saw parts of two policies, or a policy that was replaced, or a buffer moved.
    """
    found = run_swaps(spec["swaps"], get_device(context), captures=context["captures"])
    if found["mixed"] or found["late"] or found["moved"]:
        raise CheckFailed(f"of {found['swaps']} passes {found['mixed']} were mixed and {found['late']} late; {found['moved']} buffers moved")
    return found


def run_swaps(num_swaps: int, device: torch.device, *, captures: bool) -> dict[str, Any]:
    """Return how many swaps were made and how many passes were mixed or late, and how many buffers changed their address."""
    shape, num_tokens = TINY, 4
    state = make_state(shape, LAYERS, device, rank=8, threshold=1e9)
    backend = state.backend
    assert isinstance(backend, CudaBackend)
    watched = [*state.buffers.tensors, *state.stable.probes[0].tensors, *state.stable.probes[1].tensors, state.stable.knobs_CK, backend.rules_S3]
    addresses = [tensor.data_ptr() for tensor in watched]
    stream_TD = torch.randn(num_tokens, shape.hidden_size, device=device)
    residual_TD = torch.zeros_like(stream_TD)
    probes = [[LREProbe(shape.hidden_size, 8).requires_grad_(False).to(device) for _ in LAYERS] for _ in range(2)]
    policies = [Policy(enabled=True, checkpoints=tuple(Checkpoint(layer=layer, threshold=t) for layer in LAYERS)) for t in (1e9, 1e-30)]

    def swap(which: int) -> None:
        state.apply(policies[which], which + 1)
        for buffer, probe in zip(state.stable.probes, probes[which], strict=True):
            buffer.write(probe)

    def run() -> tuple[torch.Tensor, ...]:
        for layer in LAYERS:
            state.observe(layer, stream_TD, residual_TD)
        return ()

    expected = []
    for which in range(2):
        swap(which)
        risks = [get_risk(state, index, stream_TD, residual_TD) for index in range(len(LAYERS))]
        # confident at the first checkpoint: the second has nothing left to decide
        expected.append((risks[0], torch.full_like(risks[0], torch.nan) if which == 0 else risks[1], 1 if which == 0 else 0))
    replay = Replay(run, captures=captures)
    mixed = late = 0
    for number in range(num_swaps):
        which = number % 2
        swap(which)
        begin(state, num_tokens)
        replay()
        level_T, risk_CT = state.level_T[:num_tokens].clone(), state.buffers.risk_CT[:, :num_tokens].clone().double()
        state.end_step()
        matches = [_matches(risk_CT, level_T, expected[w]) for w in range(2)]
        late += matches[1 - which]
        mixed += not any(matches)
    moved = sum(tensor.data_ptr() != address for tensor, address in zip(watched, addresses, strict=True))
    return {"swaps": num_swaps, "mixed": mixed, "late": late, "moved": moved}


def _matches(risk_CT: torch.Tensor, level_T: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor, int]) -> bool:
    """Whether a pass left what a policy leaves."""
    near = [torch.allclose(risk_CT[i], expected[i], rtol=1e-4, equal_nan=True) for i in range(2)]
    return all(near) and bool((level_T == expected[2]).all())
