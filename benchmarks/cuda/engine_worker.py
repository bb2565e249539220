"""The worker of the 7B-shaped dummy in benchmarks/cuda/engine.py: SEDAC's own, and thresholds from gates measured in the running engine.

A dummy's gates are of no size that a probe set could know beforehand. They are measured on what the MLPs really read, in one pass
that no CUDA graph holds, and the thresholds are then put where the kernels read them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sedac.engine.backends.base import GatedMlp
from sedac.engine.backends.kinds import KIND_CONTEXTUAL
from sedac.engine.backends.torch_mlp import TorchMlp
from sedac.engine.step.worker import SedacWorker
from torch import Tensor
from torch.nn import functional

MAX_ROWS = 64
"""A layer's threshold is taken from at most so many rows of a pass."""


class _Recording:
    """Stands before a `DeviceMlp` and shows what it is asked to compute."""

    def __init__(self, inner: Any, keep: Callable[[Tensor], None]) -> None:
        self._inner, self._keep = inner, keep

    def compute(self, x_TD: Tensor, **keywords: Any) -> Tensor:
        """Return what the MLP returns."""
        self._keep(x_TD)
        return self._inner.compute(x_TD, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Worker(SedacWorker):
    """See the module's docstring."""

    def bench_record(self) -> None:
        """Keep what each gated MLP reads in the passes to come, until `bench_set_thresholds`; a policy must be active in them."""
        self.bench_inputs: dict[int, Tensor] = {}
        self.bench_undo: list[Any] = []
        for gated in self.sedac_state.backend.mlps:
            inner = getattr(gated, "device", None)
            if inner is None:  # on the CPU
                handle = gated.module.register_forward_pre_hook(functools.partial(self._keep_arguments, gated.layer))
                self.bench_undo.append(handle.remove)
                continue
            gated.device = _Recording(inner, functools.partial(self._keep, gated.layer))
            self.bench_undo.append(functools.partial(setattr, gated, "device", inner))

    def bench_set_thresholds(self, share: float) -> dict[str, Any]:
        """Set every contextual level's threshold so that `share` of each layer's neurons passed it, on average over the recorded rows.

        Raises:
            RuntimeError: an MLP has not run since `bench_record`.
        """
        for undo in self.bench_undo:
            undo()
        found = []
        for gated in self.sedac_state.backend.mlps:
            layer = gated.layer
            if layer not in self.bench_inputs:
                raise RuntimeError(f"the MLP of layer {layer} has not run outside CUDA graphs under an active policy; thresholds can't be measured")
            score = functional.linear(self.bench_inputs[layer], self._get_gate(gated)).float().abs().flatten().sort(descending=True).values
            keep = max(1, min(score.numel() - 1, round(share * score.numel())))
            threshold = float(score[keep - 1 : keep + 1].mean())  # between two scores, so that none lies on it
            gated.parameter_V[gated.kind_V == KIND_CONTEXTUAL] = threshold  # in place: the kernels know the address
            found.append(threshold)
        self.bench_inputs = {}
        return {"share": share, "num_rows": MAX_ROWS, "thresholds": found}

    def _get_gate(self, gated: GatedMlp) -> Tensor:
        """Return the gate's weights (F, D), of SEDAC's own copy where vLLM has packed its away."""
        if isinstance(gated, TorchMlp) and gated.neurons is not None:
            return gated.neurons.gate_FD
        weight = gated.module.gate_up_proj.weight.data
        return weight[: weight.shape[0] // 2]

    def _keep(self, layer: int, x_TD: Tensor) -> None:
        if self.sedac_state.num_tokens:  # no warm-up
            self.bench_inputs[layer] = x_TD[: min(MAX_ROWS, self.sedac_state.num_tokens)].clone()

    def _keep_arguments(self, layer: int, module: Any, arguments: tuple[Tensor, ...]) -> None:
        self._keep(layer, arguments[0])
