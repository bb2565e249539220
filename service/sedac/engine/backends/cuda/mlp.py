"""One layer's MLP on the device: the form that its number of rows asks for, captured or not, without asking the host for levels.

Rows at level `full` come from the module's own products wherever these run: always in the forms few and middle. T tokens of the
graph, D hidden size, F neurons, V levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sedac.engine.backends.cuda import forms
from sedac.engine.backends.cuda.device import DeviceBackend, next_power
from sedac.engine.backends.cuda.few import down_kernel, gate_up_kernel
from sedac.engine.backends.cuda.guard import is_capturing, run_if
from sedac.engine.backends.cuda.many import grouped_down_kernel, grouped_gate_up_kernel
from sedac.engine.backends.cuda.rows import activation_kernel, compact_kernel, finish_kernel, merge_kernel

MAX_HOST_ROWS = 512
"""Most rows of a pass outside CUDA graphs for which the host reads the flags. Longer passes run dense and masked."""
_FEW_K, _FEW_D, _DOWN_K, _DOWN_D, _PARTS = 16, 256, 32, 256, 32
_MANY_M, _MANY_F, _MANY_D, _MANY_K = 64, 64, 128, 64
_MANY_BLOCKS = 256  # that down's work is cut into where one block of rows is left: about two for each multiprocessor
_ROW_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class DeviceNeurons:
    """What reduced levels read beside the module's own weights."""

    order_F: Tensor
    """The model's own neuron (of this rank) of each place, the most important first, int32."""
    rank_F: Tensor
    """The place of each neuron, int32."""
    natural_scale_F: Tensor
    """Scales in the model's own order, fp32. The score is abs(gate) * scale."""
    scale_F: Tensor
    """The same scales in order of importance."""
    down_FD: Tensor
    """Row n is neuron n's column of the down projection, repaired where the probe set says so."""
    repaired: bool
    scores_activation: bool


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A module that is two plain products and an activation: down(act(gate) * up)."""

    weights: tuple[Tensor, Tensor]
    """Gate and up (2F, D) and down (D, F) in nn.Linear's layout."""
    gate_up: Callable[[Tensor], Tensor]
    """Maps (T, D) to (T, 2F)."""
    down: Callable[[Tensor], Tensor]
    """Maps (T, F) to (T, D), without the sum over ranks."""
    activation: int
    """Number of the activation in neurons.ACTIVATIONS."""
    own_activation: Callable[[Tensor], Tensor] | None = None
    """Kernel of vLLM's own, (T, 2F) -> (T, F), where vLLM uses it. If None, vLLM leaves the activation to the compiler, whose bits are ours too."""


@dataclass(frozen=True, kw_only=True)
class DeviceMlp:
    """One MLP; see the module's docstring. All tensors keep their addresses."""

    backend: DeviceBackend
    layer: int
    kind_V: Tensor
    """Kind of each level as this module computes it, uint8."""
    parameter_V: Tensor
    """Parameter of each level, fp32: neurons of a width (of this rank), or threshold of a score."""
    falling_V: Tensor
    """Numbers of the levels by falling width, int32."""
    base: Callable[[Tensor], Tensor]
    """The module as vLLM has it, (T, D) -> (T, D), without the sum over ranks."""
    parts: Parts | None
    """What the module is made of. None for another kind of module (quantised, LoRA, experts), which has only `full` and `skip`."""
    neurons: DeviceNeurons | None
    """What reduced levels read, which needs `parts`. None where the probe set has no reduced levels."""
    form: int | None = None
    """For benchmarks: the form to take, whatever the number of rows. If None, the number of rows decides."""

    def choose_form(self, num_tokens: int) -> int:
        """Return the form for so many rows."""
        size = sum(w.numel() * w.element_size() for w in self.parts.weights) if self.parts else 0
        wanted = forms.choose(
            num_tokens, has_neurons=self.neurons is not None, is_dense=self.parts is not None, weight_bytes=size,
            min_weight_bytes=self.backend.min_weight_bytes,
        )  # fmt: skip
        return wanted if self.form is None else self.form

    def compute_plain(self, x_TD: Tensor) -> Tensor:
        """Return what the module gives where nothing is reduced, (T, D), with the bits that it has in plain vLLM; between steps alone."""
        if self.parts is None:
            return self.base(x_TD)
        return self.parts.down(self._activate(self.parts, self.parts.gate_up(x_TD)))

    def compute(self, x_TD: Tensor, *, always: bool = False) -> Tensor:
        """Return (T, D), each row at its level as the buffers say while the device runs; padding rows hold no meaning.

        `always` launches everything that a graph of this size may launch, whatever the flags say: a warm-up of an idle engine.
        """
        x_TD = x_TD.contiguous()
        num_rows = x_TD.shape[0]
        outside = not is_capturing() and num_rows > MAX_HOST_ROWS
        form = forms.MIDDLE if outside else self.choose_form(num_rows)
        dense, always = self.backend.dense_GL[form, self.layer], always or outside
        out_TD = run_if(dense, lambda: self._run_dense(x_TD, form, always=always), always=always)
        if out_TD is None:
            out_TD = torch.empty_like(x_TD)
        if form == forms.FEW:
            self._run_few(x_TD, dense, out_TD)
        elif form == forms.MANY:
            self._run_many(x_TD, dense, out_TD)
            self._finish(out_TD, dense, after_dense=False, counts=False)
        else:  # of another module, which has this form alone, nothing has masked the skipped rows yet
            self._finish(out_TD, dense, after_dense=self.parts is None, counts=True)
        return out_TD

    @property
    def _levels(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.backend.buffers.level_T, self.backend.live, self.kind_V, self.parameter_V

    def _run_dense(self, x_TD: Tensor, form: int, *, always: bool) -> Tensor:
        """Run the module's own products over all rows, reduced ones masked between them."""
        if self.parts is None:
            return self.base(x_TD)
        h_TF = self._activate(self.parts, self.parts.gate_up(x_TD))
        out_TD = self.parts.down(h_TF)
        if (neurons := self.neurons) is not None and neurons.repaired:
            run_if(self.backend.repair_GL[form, self.layer], lambda: self._repair(h_TF, neurons, out_TD), always=always)
        return out_TD

    def _activate(self, parts: Parts, gate_up_TF: Tensor) -> Tensor:
        (num_rows, width), neurons, b = gate_up_TF.shape, self.neurons, self.backend.buffers
        size = width // 2
        h_TF = gate_up_TF.new_empty((num_rows, size)) if parts.own_activation is None else parts.own_activation(gate_up_TF)
        rank_F, scale_F = (neurons.rank_F, neurons.natural_scale_F) if neurons else (b.scale_T, b.scale_T)  # never read without neurons
        activation_kernel[(num_rows, -(-size // _ROW_BLOCK))](
            gate_up_TF, h_TF, rank_F, scale_F, *self._levels, b.saved_T, size, gate_up_TF.stride(0),
            ACTIVATION=parts.activation, SCORES_ACTIVATION=neurons is not None and neurons.scores_activation, HAS_NEURONS=neurons is not None,
            MASKS_ONLY=parts.own_activation is not None, BLOCK_F=_ROW_BLOCK,
        )  # fmt: skip
        return h_TF

    def _repair(self, h_TF: Tensor, neurons: DeviceNeurons, out_TD: Tensor) -> None:
        repaired_TD, (num_rows, size) = h_TF @ neurons.down_FD, out_TD.shape
        grid = (num_rows, -(-size // _ROW_BLOCK))
        merge_kernel[grid](out_TD, repaired_TD, *self._levels, size, out_TD.stride(0), repaired_TD.stride(0), BLOCK_D=_ROW_BLOCK)

    def _finish(self, out_TD: Tensor, dense: Tensor, *, after_dense: bool, counts: bool) -> None:
        (num_rows, size), b = out_TD.shape, self.backend.buffers
        grid = (num_rows, -(-size // _ROW_BLOCK))
        finish_kernel[grid](
            out_TD, *self._levels, b.saved_T, dense.view(torch.int8), b.active, size, out_TD.stride(0),
            AFTER_DENSE=after_dense, COUNTS=counts, BLOCK_D=_ROW_BLOCK,
        )  # fmt: skip

    def _run_few(self, x_TD: Tensor, dense: Tensor, out_TD: Tensor) -> None:
        assert self.parts is not None
        assert self.neurons is not None
        (num_rows, hidden_size), neurons, b = x_TD.shape, self.neurons, self.backend.buffers
        gate_up_FD = self.parts.weights[0]
        size, flag, rows = gate_up_FD.shape[0] // 2, dense.view(torch.int8), max(forms.MAX_FEW, next_power(num_rows))
        h_TF, wanted_F = x_TD.new_empty((num_rows, size), dtype=torch.float32), x_TD.new_empty(size, dtype=torch.int32)
        gate_up_kernel[(-(-size // _FEW_K),)](
            x_TD, gate_up_FD, neurons.order_F, neurons.scale_F, *self._levels, flag, h_TF, wanted_F, self.backend.count_T,
            num_rows, hidden_size, size, x_TD.stride(0), gate_up_FD.stride(0),
            ACTIVATION=self.parts.activation, SCORES_ACTIVATION=neurons.scores_activation, BLOCK_T=rows, BLOCK_K=_FEW_K, BLOCK_D=_FEW_D,
            num_warps=4, num_stages=4,
        )  # fmt: skip
        part = -(-size // (_PARTS * _DOWN_K)) * _DOWN_K
        parts_PTD = x_TD.new_empty((-(-size // part), num_rows, hidden_size), dtype=torch.float32)
        down_kernel[(-(-hidden_size // _DOWN_D), parts_PTD.shape[0])](
            h_TF, neurons.down_FD, wanted_F, *self._levels, flag, parts_PTD, self.backend.arrived, self.backend.count_T, b.saved_T, out_TD,
            num_rows, hidden_size, size, part, out_TD.stride(0), BLOCK_T=rows, BLOCK_K=_DOWN_K, BLOCK_D=_DOWN_D, num_warps=4, num_stages=7,
        )  # fmt: skip

    def _run_many(self, x_TD: Tensor, dense: Tensor, out_TD: Tensor) -> None:
        assert self.parts is not None
        (num_rows, hidden_size), neurons, b = x_TD.shape, self.neurons, self.backend.buffers
        gate_up_FD, down_DF = self.parts.weights
        size, flag = gate_up_FD.shape[0] // 2, dense.view(torch.int8)
        listed = next_power(num_rows) + _MANY_M
        index, bounds = x_TD.new_empty(listed, dtype=torch.int32), x_TD.new_empty(2, dtype=torch.int32)
        compact_kernel[(1,)](
            *self._levels, self.falling_V, flag, index, bounds, b.saved_T, num_rows, size, BLOCK_M=_MANY_M, BLOCK_T=next_power(num_rows), num_warps=4
        )
        h_MF = x_TD.new_empty((listed, size))
        order_F, scale_F = (neurons.order_F, neurons.scale_F) if neurons else (index, b.scale_T)  # never read without neurons
        num_blocks = -(-num_rows // _MANY_M) + 1  # full and reduced rows share no block
        common = (index, bounds, *self._levels, flag)
        grouped_gate_up_kernel[(num_blocks, -(-size // _MANY_F))](
            x_TD, gate_up_FD, order_F, scale_F, *common, h_MF, hidden_size, size, x_TD.stride(0), gate_up_FD.stride(0),
            ACTIVATION=self.parts.activation, SCORES_ACTIVATION=neurons is not None and neurons.scores_activation, HAS_NEURONS=neurons is not None,
            BLOCK_M=_MANY_M, BLOCK_N=_MANY_F, BLOCK_K=_MANY_K, num_warps=4, num_stages=3,
        )  # fmt: skip
        down_FD = neurons.down_FD if neurons else down_DF
        columns = -(-hidden_size // _MANY_D)
        part = -(-size // (max(1, _MANY_BLOCKS // columns) * _MANY_K)) * _MANY_K
        parts_PMD = x_TD.new_empty((-(-size // part), num_blocks * _MANY_M, hidden_size), dtype=torch.float32)
        grouped_down_kernel[(num_blocks, columns, parts_PMD.shape[0])](
            h_MF, down_DF, down_FD, order_F, *common, parts_PMD, self.backend.arrived, out_TD,
            hidden_size, size, part, parts_PMD.shape[1], down_DF.stride(0), out_TD.stride(0),
            HAS_NEURONS=neurons is not None, BLOCK_M=_MANY_M, BLOCK_N=_MANY_D, BLOCK_K=_MANY_K, num_warps=4, num_stages=4,
        )  # fmt: skip
