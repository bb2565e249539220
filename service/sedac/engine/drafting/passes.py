"""Draft passes: one new token per sequence and pass on the target's own KV cache, until every sequence has stopped.

The drafter says which rows draft, how far, and by which rule they stop; what the passes run on is built here, from the target's parts:
the backend's own operation where it has one, else vLLM's modules.
N drafting sequences, T tokens of the step, D hidden size, V vocabulary, K drafts of a sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sedac.engine.backends.base import Backend, DraftLayer, DraftPass
from sedac.engine.drafting import draws
from sedac.engine.drafting.attention import DraftAttention
from sedac.engine.drafting.controller import Limits
from sedac.engine.drafting.draws import Draws
from sedac.engine.drafting.heads import HeadCache, HeadLayer, Nothing
from sedac.engine.drafting.model import DraftModel, make_layers, make_norm
from sedac.engine.drafting.parts import (
    VllmConfig,
    process_weights_after_loading,
    set_current_vllm_config,
    set_default_torch_dtype,
    set_forward_context,
    set_model_tag,
)
from sedac.policy.model import FULL
from sedac.probe.draft import REDUCED, load_head
from sedac.probe.draft_manifest import DraftManifest, check_fit

_log = logging.getLogger(__name__)
_HEAD_PREFIX = "sedac_draft.layers"


@dataclass(kw_only=True)
class Drafted:
    """What the passes of one step gave, by number of the drafting sequence."""

    tokens: list[list[int]]
    confidences: list[list[float]]
    """Confidences of the tokens, 0 to 1."""
    probs_NKV: Tensor | None = None
    """Distributions that the tokens were drawn from, fp32. None where all sequences are greedy."""
    num_passes: int = 0
    expected: list[float] = field(default_factory=list)
    """Expected acceptance of each token, of all sequences."""


class Passes:
    """Runs draft passes; see the module's docstring."""

    def __init__(self, vllm_config: VllmConfig, manifest: DraftManifest, directory: Path, target: Any) -> None:
        """Build the draft from the target's parts, before KV caches are made.

        Raises:
            ArtifactError: the draft is of another model.
        """
        self.vllm_config, self.target = vllm_config, target
        config = vllm_config.model_config
        text = config.hf_text_config
        self.stream_TD: Tensor | None = getattr(target, "sedac_stream_TD", None)
        self._backend: Backend = target.sedac_state.backend
        table = self._backend.table
        check_fit(manifest, hidden_size=text.hidden_size, num_layers=text.num_hidden_layers, levels=table.names)
        self._level = table.get_index(manifest.level) if manifest.level != FULL else 0
        list_name, layers = target.sedac_layers
        inner = target.get_submodule(list_name.rpartition(".")[0])
        weights = load_head(directory, manifest)
        device = next(target.parameters()).device
        self.head: HeadLayer | None = None
        self._pass: DraftPass | None = None
        """Draft pass of the backend's own. None where passes run as vLLM's modules."""
        with set_current_vllm_config(vllm_config), set_default_torch_dtype(config.dtype), device, set_model_tag("sedac_draft"):
            norm: nn.Module | None = None
            if manifest.kind != REDUCED:
                self.head = HeadLayer(manifest, vllm_config, f"{_HEAD_PREFIX}.{text.num_hidden_layers}")
                self.head.load(weights)
                norm = make_norm(manifest, weights["norm.weight"])
                process_weights_after_loading(self.head, config, device)
            if self.head is not None and self.head.has_attention:
                with set_model_tag("sedac_draft_cache"):
                    self._head_cache = HeadCache(vllm_config=vllm_config, head=self.head)
            self._draft = DraftModel(vllm_config=vllm_config, inner=inner, layers=make_layers(layers, manifest, self.head), norm=norm)
        self._names = [f"{_HEAD_PREFIX}.{text.num_hidden_layers}.attn"] if self.head and self.head.has_attention else []
        prefix = f"{list_name}."
        for name in vllm_config.compilation_config.static_forward_context:
            if name.startswith(prefix) and int(name[len(prefix) :].split(".")[0]) < manifest.depth:
                self._names.append(name)

    @property
    def is_one_operation(self) -> bool:
        """Whether a pass is the backend's own operation."""
        return self._pass is not None

    @property
    def cache_name(self) -> str | None:
        """Name of the head's attention layer, which has a KV cache; None: no head with attention."""
        return self._names[0] if self.head is not None and self.head.has_attention else None

    def warm_up(self, runner: Any) -> None:
        """Let the backend make its draft pass, or else compile the draft for two sequences and for one; the runner's KV caches exist."""
        self._attention = DraftAttention(runner, self._names)
        try:
            if self._attention.num_groups != 1:
                raise ValueError("there is more than one kind of KV cache")
            layers, inner = [_describe(layer) for layer in self._draft.inner.layers], self._draft.inner
            self._pass = self._backend.make_draft_pass(layers, inner, inner.norm, self.target, gated=self._level > 0)
        except ValueError as error:
            _log.info("draft passes run as vLLM's modules, not as one operation: %s", error)
        if self._pass is not None:
            return
        for num in (2, 1):
            ids_N = torch.zeros(num, dtype=torch.int32, device=runner.device)
            with torch.inference_mode(), set_forward_context(None, self.vllm_config, num_tokens=num):
                self._draft(ids_N, ids_N.long())
                if self.stream_TD is not None:
                    self._head_cache(ids_N.long(), self.stream_TD[:num])

    def fill(self, positions_T: Tensor, slots_T: Tensor) -> None:
        """Write the head's keys and values of the tokens that the target has just computed, at their positions, into their slots."""
        assert self.head is not None
        assert self.stream_TD is not None
        stream_TD = self.stream_TD[: len(positions_T)]
        if self._pass is not None:
            self._pass.fill(stream_TD, positions_T, slots_T)
        else:
            keys, values = self._head_cache(positions_T, stream_TD)
            self.head.write_cache(keys, values, slots_T)

    def run(
        self,
        ids_N: Tensor,
        positions_N: Tensor,
        *,
        max_position: int,
        rows: list[int] | None,
        lengths: Sequence[int],
        limits: Limits,
        sampling: Draws | None,
        samples: Sequence[bool],
        expect: Callable[[bool, float], float],
    ) -> Drafted:
        """Draft after the tokens `ids_N` (int32) at `positions_N` (int64) until every sequence has stopped.

        `rows` of the batch, None: all; `lengths`: tokens that each may draft at most; `samples`: whether each is sampled; `expect`:
        (whether it is sampled, confidence) -> the acceptance that is expected of a token.
        """
        num = len(lengths)
        self._attention.begin(rows)
        live, joints = list(range(num)), [1.0] * num
        drafted = Drafted(tokens=[[] for _ in lengths], confidences=[[] for _ in lengths])
        restore = self._backend.begin_draft(self._level, num) if self._level else None
        for position in range(max(lengths)):
            logits_NV = self._compute(ids_N, positions_N, max_position)
            tokens_N, confidence_N, probs_NV = draws.draw(logits_NV, sampling, pick=self._backend.pick)
            drafted.num_passes += 1
            if probs_NV is not None:
                if drafted.probs_NKV is None:
                    drafted.probs_NKV = torch.zeros(num, max(lengths), logits_NV.shape[-1], device=logits_NV.device)
                drafted.probs_NKV[live, position] = probs_NV
            for number, token, value in zip(live, tokens_N.tolist(), confidence_N.tolist(), strict=True):
                drafted.tokens[number].append(token)
                drafted.confidences[number].append(value)
                expected = expect(samples[number], value)
                joints[number] *= expected
                drafted.expected.append(expected)
            kept = [i for i, number in enumerate(live) if joints[number] >= limits.min_confidence and position + 1 < lengths[number]]
            if not kept or sum(joints[live[i]] for i in kept) < limits.min_sum:
                break
            if len(kept) < len(live):
                index_N = torch.tensor(kept, device=tokens_N.device)
                tokens_N, positions_N = tokens_N[index_N], positions_N[index_N]
                self._attention.keep(index_N)
                sampling = sampling.keep(kept) if sampling else None
                live = [live[i] for i in kept]
            ids_N, positions_N, max_position = tokens_N.int(), positions_N + 1, max_position + 1
        if restore is not None:
            restore()
        return drafted

    def _compute(self, ids_N: Tensor, positions_N: Tensor, max_position: int) -> Tensor:
        """Return the logits (N, V) of one pass."""
        metadata, slots = self._attention.build(positions_N, max_position)
        if self._pass is not None:
            out = self._pass.run(ids_N, positions_N, metadata[self._names[0]])
            if self._pass.num_outputs:
                return out
        else:
            with set_forward_context(metadata, self.vllm_config, num_tokens=len(ids_N), slot_mapping=slots):
                out = self._draft(ids_N, positions_N)
        logits_NV: Tensor = self.target.compute_logits(out)
        return logits_NV


def _describe(layer: Any) -> DraftLayer:
    """Return the parts of a draft's layer.

    Raises:
        ValueError: it has no attention of its own name.
    """
    if isinstance(layer, HeadLayer):
        return DraftLayer(layer=layer, attention=layer if layer.has_attention else None, mlp=layer if layer.has_mlp else None, is_head=True)
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attention is None:
        raise ValueError(f"{type(layer).__name__} has no self_attn")
    return DraftLayer(
        layer=layer, attention=None if isinstance(attention, Nothing) else attention, mlp=None if isinstance(mlp, Nothing) else mlp, is_head=False
    )
