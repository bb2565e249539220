"""What the engine asks of whatever computes: one `Backend` per model, chosen once (choice.py), and one object per gated MLP.

All calls come on the thread that runs the model. While it is built: `attach_mlp`, and `finish_mlp` once weights are loaded, by the
model's class and the worker. In every forward pass: `begin`, then `observe` at each checkpoint and the MLPs' own `compute`, then `end`, by the
`State` and the modules. Between two passes: `set_sides`, `settle`, `then`, and the drafter's. Backends know buffers and levels; policies,
requests and counters are the `State`'s.
T tokens of the step, C checkpoints, S sides, D hidden size, N rows, V vocabulary.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sedac.engine.backends.levels import LevelTable
from sedac.errors import UnsupportedModel
from sedac.probe.levels import Neurons

if TYPE_CHECKING:
    from sedac.engine.backends.sides import SideBuffers
    from sedac.engine.backends.tokens import Array, TokenBuffers, Tokens


class Left(NamedTuple):
    """What a pass left in which something was reduced or decided."""

    saved_T: Array
    """MLPs saved per token, float32."""
    done_T: Array
    """Is 1 where a decision was final, uint8; of several passes together their number."""
    risk_CT: Array
    """Risks, float32. NaN where not evaluated."""
    counts_SC2: list[Any] | None = None
    """Totals (evaluated, exited) of each side after the pass. If None, its buffers have them now."""


Count = Callable[["Tokens | None", Left | None], None]
"""Takes a pass's tokens (None where nothing could be reduced) and what it left (None where nothing was reduced)."""
Action = Callable[..., None]
"""Takes its own arguments, and behind them the MLPs saved per token (T,) of a pass, or None where none were saved."""


class Checkpoint(Protocol):
    """What a decoder layer with a checkpoint says of it."""

    layer: int
    """Number of the decoder layer, 0-based."""
    name: str
    """Name of the decoder layer in the model."""
    index: int
    """Number among the checkpoints, 0-based."""
    is_recorded: bool
    """Whether the state itself must see the stream."""


class GatedMlp(ABC):
    """What a backend keeps of one MLP, held by the module as `mlp.sedac`; `module` is (T, D) -> (T, D), row by row."""

    kind_V: Tensor
    """Kind of each level as this MLP computes it, uint8. It is there after `finish`."""
    parameter_V: Tensor
    """Parameter of each level, fp32. It is there after `finish`, and what is written in place takes effect at the next pass."""
    needs_warm_up = True
    """Whether vLLM's own code computes it, some of which is compiled by size when it first runs."""

    def __init__(self, backend: Backend, module: Any, name: str, layer: int) -> None:
        self.backend, self.module, self.name, self.layer = backend, module, name, layer
        base: Any = type(module)
        self.base: Callable[[Tensor], Tensor] = functools.partial(base.forward, module)
        """The module's forward, as vLLM has it."""

    def gate(self, make_class: Callable[[Any], type[nn.Module]]) -> None:
        """Put the module under this object: it keeps its weights and names and gets the class that `make_class` makes of its own."""
        # A buffer, not a field here: traced code reads it, and the compiler must know it as one of the model's.
        self.module.register_buffer("sedac_level_T", self.backend.buffers.level_T, persistent=False)
        self.module.sedac = self
        self.module.__class__ = make_class(type(self.module))

    @abstractmethod
    def compute(self, x_TD: Tensor) -> Tensor:
        """Return (T, D), every row at its level; in an idle pass what vLLM gives."""

    @abstractmethod
    def finish(self) -> None:
        """Take the loaded weights.

        Raises:
            UnsupportedModel: they can't be read as reduced levels need it.
        """


@dataclass(frozen=True, kw_only=True)
class DraftLayer:
    """One decoder layer of a draft, part by part."""

    layer: Any
    """The decoder layer, which holds the norms before the parts."""
    attention: Any
    """None where the draft leaves it out."""
    mlp: Any
    """None where the draft leaves it out."""
    is_head: bool
    """Whether the layer is the draft's own."""


class DraftPass(Protocol):
    """A draft's layers as one operation."""

    num_outputs: int
    """Logits per row. 0 means that `run` gives states, and that the model's own lm_head must follow."""

    def run(self, ids_N: Tensor, positions_N: Tensor, metadata: Any) -> Tensor:
        """Return logits (N, V), or normed states (N, D), of one new token per sequence; `metadata`: of attention, as vLLM builds it."""

    def fill(self, stream_TD: Tensor, positions_T: Tensor, slots_T: Tensor) -> None:
        """Write the head's keys and values of tokens whose stream the target has computed."""


class Backend(ABC):
    """One model's computing; see the module's docstring for who calls what, and when."""

    label: ClassVar[str]
    """Name of its kernels in the log."""
    kinds: ClassVar[frozenset[str]]
    """Names of the kinds of levels that it computes."""
    can_repeat: ClassVar[bool] = False
    """Whether passes over the very same tokens can be counted together: `begin_repeat`, `end_repeat`, `take_repeats`."""
    observes_idle: ClassVar[bool] = False
    """Whether checkpoints run between two steps too, where passes warm up or are captured."""

    def __init__(self, buffers: TokenBuffers, table: LevelTable, sides: Sequence[SideBuffers], counts_SC2: Tensor, count: Count) -> None:
        """`counts_SC2` (int64) holds the sides' counts, one behind the other; `count` is called once for each pass, in their order.

        Raises:
            UnsupportedModel: the table has a level of a kind that this backend lacks.
        """
        for name, kind in table.kind_names.items():
            if kind not in self.kinds:
                raise UnsupportedModel(
                    f"level {name!r} is of the kind {kind!r}, which the {self.label} kernels lack (they have {', '.join(sorted(self.kinds))}); "
                    "attach a probe set without it, or offer hard exits only: SEDAC_LEVELS=0"
                )
        self.buffers, self.table, self.sides = buffers, table, tuple(sides)
        self._counts_SC2, self._count = counts_SC2, count
        self.is_active = False
        """Whether any token of the running pass is or may get reduced."""
        self.num_tokens = 0
        """Tokens of the running step. 0 between steps."""
        self.mlps: list[GatedMlp] = []

    @abstractmethod
    def attach_mlp(self, module: Any, name: str, layer: int, neurons: Neurons | None, *, scores_activation: bool, lora: bool) -> None:
        """Gate the MLP of decoder layer `layer`, called `name` in the model; `neurons` where the probe set has reduced levels.

        Raises:
            UnsupportedModel: this module can't be gated.
        """

    def finish_mlp(self, module: Any) -> None:
        """Take the loaded weights of a gated MLP; see `GatedMlp.finish`."""
        module.sedac.finish()

    def warm_up(self, hidden_size: int, dtype: torch.dtype, *, is_compiled: bool) -> None:
        """Get ready before requests come: what vLLM compiles by size inside MLPs, and whatever a backend must learn of its machine."""
        mlps = [mlp for mlp in self.mlps if mlp.needs_warm_up and is_compiled]
        with torch.inference_mode():
            for rows in (1, 2) if mlps else ():
                mlps[-1].base(torch.zeros(rows, hidden_size, dtype=dtype, device=self.buffers.level_T.device))

    def get_faster_rows(self) -> dict[str, int]:
        """Return up to how many rows each reduced level is faster than full here; more are computed in full. Empty: that is not measured."""
        return {}

    @abstractmethod
    def set_sides(self, sides: Sequence[SideBuffers]) -> None:
        """Let these sides decide from the next pass on, by the rules that they have now."""

    @abstractmethod
    def begin(self, num_tokens: int, tokens: Tokens | None, *, is_new: bool) -> None:
        """Start a pass over `num_tokens` tokens; None: idle, all of them in full. Not new: they are the very ones of the last active pass."""

    @abstractmethod
    def observe(self, index: int, hidden_TD: Tensor, residual_TD: Tensor | None) -> None:
        """Run checkpoint `index` on the residual stream (T, D), fp32, bf16 or fp16, whole or in two parts; nothing in an idle pass."""

    def trace_observe(self, stream_TD: Tensor, level_T: Tensor, checkpoint: Checkpoint) -> None:
        """Put a checkpoint into the graph that is being traced, on the stream (T, D), fp32; `level_T` is what it writes."""
        torch.ops.vllm.sedac_checkpoint(stream_TD, level_T, checkpoint.layer, checkpoint.name)

    @abstractmethod
    def end(self, tokens: Tokens | None) -> Array | None:
        """Finish the pass over `tokens` (None: nothing could be reduced) and clear what belongs to it alone.

        Returns the MLPs saved per token (T,); None: none, or not known before `count` is called.
        """

    def begin_repeat(self, tokens: Tokens) -> None:
        """Start a pass over the very tokens of the last active one, with nothing to write but what passes change."""
        raise AssertionError(f"the {self.label} kernels repeat no pass")

    def end_repeat(self) -> None:
        """Finish such a pass; what it left is added to what the others before it have left."""
        raise AssertionError(f"the {self.label} kernels repeat no pass")

    def take_repeats(self) -> Left:
        """Return and forget what such passes have left together; `done_T` counts passes, risks are of the last one."""
        raise AssertionError(f"the {self.label} kernels repeat no pass")

    @abstractmethod
    def then(self, action: Action, *arguments: Any) -> None:
        """Call `action` with these once the last pass is counted, at once where it is; arguments that must wait are copied."""

    @abstractmethod
    def settle(self) -> None:
        """Count what all passes have left, and do what waits for it."""

    def begin_draft(self, level: int, num_tokens: int) -> Callable[[], None]:
        """Let the next passes run the MLPs of their first rows at a level, without decisions; call what it returns when they are over."""
        buffers = self.buffers
        roles_T = buffers.role_T[:num_tokens].clone()
        buffers.role_T[:num_tokens], buffers.level_T[:num_tokens] = 0, level
        buffers.active.fill_(1)
        self.is_active = True

        def end() -> None:
            """Put the buffers back to rest."""
            buffers.role_T[:num_tokens] = roles_T
            buffers.level_T[:num_tokens], buffers.saved_T[:num_tokens] = 0, 0
            buffers.active.zero_()
            self.is_active = False

        return end

    def make_draft_pass(self, layers: Sequence[DraftLayer], inner: Any, norm: nn.Module, target: Any, *, gated: bool) -> DraftPass:
        """Make one operation of a draft's layers, once KV caches exist: `inner` holds the embedding, `norm` ends it, `target` has the lm_head.

        `gated`: MLPs of the target run at the level that `begin_draft` gave, not in full.

        Raises:
            ValueError: this backend, or a part, does not allow it; says which. Drafts then run as vLLM's modules.
        """
        raise ValueError(f"the {self.label} kernels have none")

    def pick(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most likely tokens (N,), int64, and their probabilities (N,), fp32."""
        return pick(logits_NV)


def pick(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Pick the most likely tokens in plain torch; see `Backend.pick`."""
    logits_NV = logits_NV.float()
    tokens_N = logits_NV.argmax(-1)
    best_N = logits_NV.gather(1, tokens_N[:, None])[:, 0]
    return tokens_N, (best_N - logits_NV.logsumexp(-1)).exp()
