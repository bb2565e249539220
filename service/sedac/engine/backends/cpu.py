"""The backend on the CPU: the operators `sedac::*` of kernels/*.cpp, which `python -m sedac.engine.backends.build` has built.

They are loaded once per worker and know one model, the last whose backend was made. T tokens of the step, N rows, D hidden size, C checkpoints;
V levels, or for logits the vocabulary.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sedac.engine.backends.base import Checkpoint, DraftLayer, DraftPass, Left
from sedac.engine.backends.build import find_library
from sedac.engine.backends.cpu_costs import find_costs, put_into_force
from sedac.engine.backends.torch import TorchBackend
from sedac.probe.levels import Neurons

if TYPE_CHECKING:
    from sedac.engine.backends.sides import SideBuffers
    from sedac.engine.backends.tokens import Tokens

_log = logging.getLogger(__name__)


@functools.cache
def load() -> bool:
    """Load the operators; False, with a warning, where they were not built or don't fit this torch."""
    library = find_library()
    if library is None:
        _log.warning("SEDAC's native kernels are not built, slower torch forms run: python -m sedac.engine.backends.build")
        return False
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        _log.warning("SEDAC's native kernels don't load (%s), slower torch forms run: python -m sedac.engine.backends.build --force", error)
        return False
    torch.library.register_fake("sedac::gate_up", _gate_up_fake)
    torch.library.register_fake("sedac::down", _down_fake)
    torch.library.register_fake("sedac::checkpoint", _checkpoint_fake)
    return True


def _gate_up_fake(x: Tensor, level: Tensor, index: int, num_outputs: int, compact: bool) -> Tensor:
    return x.new_empty((x.shape[0], num_outputs))


def _down_fake(h: Tensor, level: Tensor, index: int, hidden: int) -> Tensor:
    return h.new_empty((h.shape[0], hidden))


def _checkpoint_fake(stream: Tensor, level: Tensor, index: int) -> None:
    return None


class CpuBackend(TorchBackend):
    """C++ where it takes a module, plain torch elsewhere; the model is fp32 or bf16."""

    label: ClassVar[str] = "native"
    can_repeat: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str]] = frozenset(("full", "skip", "width", "contextual"))

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        assert load(), "chosen without kernels"
        torch.ops.sedac.set_buffers([*self.buffers.tensors, self.table.ladder_VV, self.table.share_V])
        for side in self.sides:
            for i, probe in enumerate(side.probes):
                torch.ops.sedac.add_checkpoint(i, side.number, probe.tensors, probe.rank, side.knobs_CK[i], side.counts_C2[i])
        self.set_sides(self.sides)
        put_into_force(None)
        self._faster_rows: dict[str, int] = {}

    def get_faster_rows(self) -> dict[str, int]:
        """Return up to how many rows each level is faster than full; see `Backend`."""
        return self._faster_rows

    def warm_up(self, hidden_size: int, dtype: torch.dtype, *, is_compiled: bool) -> None:
        """Warm up, and find what levels cost here; all ranks of a model go by the first one's costs."""
        super().warm_up(hidden_size, dtype, is_compiled=is_compiled)
        from sedac.engine.backends.cpu_mlp import CpuMlp  # needs vLLM
        from sedac.engine.vllm.parts import share

        costs = share(find_costs([mlp for mlp in self.mlps if isinstance(mlp, CpuMlp)], self.table, self.buffers, dtype))
        put_into_force(costs)
        if costs is not None and costs.levels:
            self._faster_rows = costs.get_faster_rows()
            shown = ", ".join(f"{name} {f'up to {rows}' if rows else 'never'}" for name, rows in self._faster_rows.items())
            _log.info("SEDAC: rows up to which levels are faster than full here: %s; more are computed in full", shown)

    def attach_mlp(self, module: Any, name: str, layer: int, neurons: Neurons | None, *, scores_activation: bool, lora: bool) -> None:
        """Gate an MLP; see `Backend`."""
        from sedac.engine.backends.cpu_mlp import CpuMlp  # needs vLLM

        self.mlps.append(CpuMlp(self, module, name, layer, neurons, scores_activation=scores_activation, lora=lora))

    def set_sides(self, sides: Sequence[SideBuffers]) -> None:
        """Let these sides decide from the next pass on."""
        for side in sides:
            torch.ops.sedac.set_rule(side.number, *side.rule_numbers)
        torch.ops.sedac.set_strict(any(side.is_strict for side in sides))

    def begin_repeat(self, tokens: Tokens) -> None:
        """Start another pass over the last active one's tokens."""
        self._repeated = tokens
        self.num_tokens, self.is_active = len(tokens.role_T), True
        torch.ops.sedac.begin_repeat(tokens.floor_tensor)

    def end_repeat(self) -> None:
        """Finish it."""
        torch.ops.sedac.end_repeat(self.num_tokens)
        self.num_tokens, self.is_active = 0, False

    def take_repeats(self) -> Left:
        """Return and forget what such passes have left together."""
        num_tokens = len(self._repeated.role_T)
        saved_T, done_T = torch.ops.sedac.take_repeats(num_tokens)
        risk_CT = self.buffers.risk_CT[:, :num_tokens].numpy().copy()
        self.buffers.risk_CT[:, :num_tokens] = torch.nan
        return Left(saved_T.numpy(), done_T.numpy(), risk_CT)

    def observe(self, index: int, hidden_TD: Tensor, residual_TD: Tensor | None) -> None:
        """Run checkpoint `index` for all sides."""
        if self.is_active:
            torch.ops.sedac.checkpoint_parts(hidden_TD, residual_TD, self.buffers.level_T, index)

    def trace_observe(self, stream_TD: Tensor, level_T: Tensor, checkpoint: Checkpoint) -> None:
        """Put the checkpoint's operator into the graph, unless the `State` must see the stream."""
        if checkpoint.is_recorded:
            super().trace_observe(stream_TD, level_T, checkpoint)
        else:
            torch.ops.sedac.checkpoint(stream_TD, level_T, checkpoint.index)

    def make_draft_pass(self, layers: Sequence[DraftLayer], inner: Any, norm: nn.Module, target: Any, *, gated: bool) -> DraftPass:
        """Make a draft pass of kernels/draft.cpp; see `Backend`."""
        from sedac.engine.backends.cpu_draft import CpuDraftPass  # needs vLLM

        return CpuDraftPass(layers, inner, norm, target, gated=gated)

    def pick(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Pick the most likely tokens; see `Backend`."""
        return pick(logits_NV)


def pick(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Pick the most likely tokens in one pass over each row of logits (N, V), fp32 or bf16; see `Backend.pick`."""
    tokens_N, confidence_N = torch.ops.sedac.draft_pick(logits_NV)
    return tokens_N, confidence_N
