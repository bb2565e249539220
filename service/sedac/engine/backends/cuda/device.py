"""What a GPU keeps of one model and the launches of its passes, inside vLLM's CUDA graphs too; nothing asks the host. See backend.py.

Every buffer is allocated once, so that graphs captured over it stay right: a new policy or probe is copied into place on the forward's
stream and the next replay reads it. What a pass leaves is counted a step later (results.py).
T tokens of the step, C checkpoints, L layers, D hidden size, R largest rank, S sides, P parts of a projection.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sedac.engine.backends.base import Action, Backend, Left
from sedac.engine.backends.cuda import forms
from sedac.engine.backends.cuda.decide import checkpoint_kernel
from sedac.engine.backends.cuda.flags import begin_kernel, end_kernel
from sedac.engine.backends.cuda.forms import NUM_FORMS
from sedac.engine.backends.cuda.results import Waiting
from sedac.engine.backends.cuda.transfer import Outgoing, Returned

if TYPE_CHECKING:
    from sedac.engine.backends.sides import SideBuffers
    from sedac.engine.backends.tokens import Array, Tokens

_CHUNKS = (16, 256, 1024)  # few, so that few kernels are built
_END_CHUNK = 256
_MAX_BLOCKS = 4096  # of an output
_DOT_ROWS = 16  # the least that a matrix unit takes
_DOT_D = 64
_NUM_PROGRAMS = 264  # of a projection: two for each multiprocessor of an H100
_MIN_ROOM = 512  # rows of z, so that a few tokens can have many parts


def next_power(n: int) -> int:
    """Return the smallest power of 2 that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def _choose_chunk(num_tokens: int) -> int:
    return next((chunk for chunk in _CHUNKS if num_tokens <= chunk), _CHUNKS[-1])


class DeviceBackend(Backend):
    """Flags, rules and scratch of one model on the GPU, and the launches at the ends of a pass and at its checkpoints."""

    label: ClassVar[str] = "Triton"
    kinds: ClassVar[frozenset[str]] = frozenset(("full", "skip", "width", "contextual"))
    observes_idle: ClassVar[bool] = True

    def __init__(self, *arguments: Any, min_weight_bytes: int | None = None) -> None:
        """`min_weight_bytes`: an MLP of less is not reduced at few rows; None: forms.MIN_WEIGHT_BYTES."""
        super().__init__(*arguments)
        buffers, sides, device = self.buffers, self.sides, self.buffers.level_T.device

        def make(dtype: torch.dtype, *shape: int, fill: float = 0) -> Tensor:
            """Return a tensor on the device, filled with one value."""
            return torch.full(shape, fill, dtype=dtype, device=device)

        self.device = device
        max_num_tokens, num_layers = buffers.level_T.shape[0], self.table.kind_LV.shape[0]
        self.max_rank = max((b.down_RD.shape[0] for side in sides for b in side.probes), default=0)
        self.waiting = Waiting()
        self.min_weight_bytes = forms.MIN_WEIGHT_BYTES if min_weight_bytes is None else min_weight_bytes
        self.live = make(torch.int32, 1)
        """Number of tokens of the step. Rows past it are padding of the graph."""
        self.dense_GL = make(torch.bool, NUM_FORMS, num_layers, fill=1)
        """Whether the layer's own products run in this step, per form."""
        self.repair_GL = make(torch.bool, NUM_FORMS, num_layers)
        """Whether reduced rows of these products take a repaired down projection, per form."""
        self.whole = make(torch.uint8, 1)
        """Is 1 where a token of the step was promised the model's own result, which only the dense products give."""
        self.rules_S3 = make(torch.float32, len(sides), 3)
        """Rule (1 is accumulate), scope (1 is batch) and decay."""
        self._z_TR = make(torch.float32, max(max_num_tokens, _MIN_ROOM), max(1, self.max_rank))
        """Parts of projections. Those of one step (P, T, R) lie from the start on."""
        self._sure_T = make(torch.int8, max_num_tokens)
        self._arrived = make(torch.int32, max_num_tokens + 1)
        self.count_T = make(torch.int32, max_num_tokens)
        """Number of active neurons of contextual rows, kept from one launch to the next."""
        self.arrived = make(torch.int32, _MAX_BLOCKS)
        self._outgoing = Outgoing(max_num_tokens, device)
        self._returned = Returned(len(sides), buffers.risk_CT.shape[0], max_num_tokens, device)
        self.launch_begin(0, is_active=False)  # builds the kernels now, not in the first step
        self._launch_end(0)

    def set_sides(self, sides: Sequence[SideBuffers]) -> None:
        """Put the sides' rules into force for the launches that follow on this stream."""
        for side in sides:
            self.rules_S3[side.number].copy_(torch.tensor(side.rule_numbers, dtype=torch.float32))

    def begin(self, num_tokens: int, tokens: Tokens | None, *, is_new: bool) -> None:
        """Start a pass, after the pass before the last has been counted: one copy and one launch where it is active."""
        self._settle(keep=1)
        self.num_tokens, self.is_active = num_tokens, tokens is not None
        if tokens is not None:
            if is_new:
                self._outgoing.send(tokens, num_tokens)
            self.launch_begin(num_tokens, num_sent=num_tokens, is_active=True)

    def launch_begin(self, num_tokens: int, *, num_sent: int = 0, is_active: bool) -> None:
        """Say how many tokens the step has; not active: all layers run dense.

        Scales, floors, roles and goals of the first `num_sent` come from what was last sent, levels and roles of the others lie in the
        buffers.
        """
        b, size, num_layers, sent = self.buffers, self.buffers.level_T.shape[0], self.table.kind_LV.shape[0], self._outgoing
        begin_kernel[(1,)](
            b.level_T, b.role_T, b.goal_T, b.scale_T, sent.scales, sent.bytes, self.table.kind_LV, b.active, self.live, self.whole,
            self.dense_GL.view(torch.int8), self.repair_GL.view(torch.int8),
            num_tokens, num_sent, int(is_active), min(num_tokens, size), num_layers, CHUNK=_choose_chunk(size), BLOCK_L=next_power(num_layers),
            num_warps=4,
        )  # fmt: skip

    def end(self, tokens: Tokens | None) -> Array | None:
        """Finish a pass, which may still run: send what it left to the host and put the buffers back to rest; one launch and one copy."""
        if self.is_active:
            num_tokens = self.num_tokens
            self._launch_end(num_tokens)
            fetched = self._returned.fetch(num_tokens)
            self.waiting.add(tokens, lambda: self._returned.read(fetched, num_tokens), is_copying=self.device.type == "cuda")
        else:
            self.waiting.add(tokens)
        self.is_active, self.num_tokens = False, 0
        return None

    def _launch_end(self, num_tokens: int) -> None:
        b, num_layers, left = self.buffers, self.table.kind_LV.shape[0], self._returned
        end_kernel[(max(1, -(-num_tokens // _END_CHUNK)),)](
            b.level_T, b.done_T, b.confidence_T, b.saved_T, b.risk_CT, b.active, self._counts_SC2, self.live,
            self.dense_GL.view(torch.int8), self.repair_GL.view(torch.int8), left.counts, left.floats, left.bytes,
            num_tokens, b.risk_CT.shape[0], num_layers, b.risk_CT.stride(0),
            NUM_COUNTS=left.num_counts, BLOCK_COUNTS=next_power(left.num_counts), CHUNK=_END_CHUNK, BLOCK_L=next_power(num_layers),
            num_warps=4,
        )  # fmt: skip

    def then(self, action: Action, *arguments: Any) -> None:
        """Call `action` when the last pass is counted; at once, with None, where none waits."""
        self.waiting.then(functools.partial(action, *map(copy.copy, arguments)))

    def settle(self) -> None:
        """Count all passes; waits for the device."""
        self._settle(keep=0)

    def _settle(self, *, keep: int) -> None:
        for step in self.waiting.take(keep):
            left = None
            if step.unpack is not None:
                saved_T, done_T, risk_CT, counts_SC2 = step.read()
                left = Left(saved_T, done_T, risk_CT, counts_SC2.tolist())
            self._count(step.tokens, left)
            for action in step.then:
                action(left.saved_T if left else None)

    def begin_draft(self, level: int, num_tokens: int) -> Callable[[], None]:
        """Let the next passes run at a level, without decisions; see `Backend`."""
        end = super().begin_draft(level, num_tokens)
        self.launch_begin(num_tokens, is_active=True)

        def end_on_device() -> None:
            """Put the buffers and the flags on the device back to rest."""
            end()
            self.launch_begin(0, is_active=False)

        return end_on_device

    def _choose_splits(self, num_rows: int, hidden_size: int, num_blocks: int) -> int:
        """Return into how many parts D is cut, so that a few tokens fill the device too; by sizes alone, as a graph needs it."""
        return max(1, min(_NUM_PROGRAMS // num_blocks, -(-hidden_size // _DOT_D), self._z_TR.shape[0] // num_rows))

    def observe(self, index: int, hidden_TD: Tensor, residual_TD: Tensor | None) -> None:
        """Run checkpoint `index` on the residual stream (T, D), fp32, bf16 or fp16, whole or in two parts; returns at once in an idle step."""
        b, (num_rows, hidden_size) = self.buffers, hidden_TD.shape
        num_rows = min(num_rows, b.level_T.shape[0])
        assert all(part.stride(1) == 1 for part in (hidden_TD, residual_TD) if part is not None), "rows of the stream are contiguous"
        is_dot = num_rows >= _DOT_ROWS
        block_t, block_r = (_DOT_ROWS, _DOT_ROWS) if is_dot else (1, 1 if num_rows <= 2 else 4)
        rank_size = next_power(self.max_rank)
        num_layers = self.table.kind_LV.shape[0]
        probes = [side.probes[index] for side in self.sides]
        per_side = [[*p.tensors, p.rank, side.knobs_CK[index], side.counts_C2[index]] for p, side in zip(probes, self.sides, strict=True)]
        grid = (-(-num_rows // block_t), max(1, -(-self.max_rank // block_r)))
        splits = self._choose_splits(num_rows, hidden_size, grid[0] * grid[1]) if is_dot else 1
        checkpoint_kernel[(*grid, splits)](
            hidden_TD, hidden_TD if residual_TD is None else residual_TD,
            b.level_T, b.role_T, b.done_T, b.goal_T, b.scale_T, b.confidence_T, b.risk_CT[index], b.active, self.live,
            self.table.ladder_VV, self.table.share_V, *per_side[0], *per_side[1],
            self.rules_S3, self._z_TR, self._sure_T, self._arrived, self.table.kind_LV, self.whole,
            self.dense_GL.view(torch.int8), self.repair_GL.view(torch.int8),
            num_rows, hidden_size, num_layers, self._z_TR.shape[1], hidden_TD.stride(0), 0 if residual_TD is None else residual_TD.stride(0),
            num_rows * self._z_TR.shape[1],
            HAS_RESIDUAL=residual_TD is not None, BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_D=_DOT_D if is_dot else 1024, BLOCK_RANK=rank_size,
            ROWS=max(1, min(block_t, 4096 // rank_size)), CHUNK=_choose_chunk(num_rows), BLOCK_L=next_power(num_layers), num_warps=4,
        )  # fmt: skip
