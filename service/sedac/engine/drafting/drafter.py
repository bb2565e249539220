"""What vLLM calls after each step to get draft tokens: its proposer interface `custom_class` (v1/spec_decode/custom_class_proposer.py, 0.32).

The draft runs on the target's own KV cache. What it writes there for the layers that it runs, verification writes again before any
layer reads it, so a draft never changes what the target computes; slots past a sequence's own blocks are reserved by
`engine/vllm/speculation.py`. A head with attention has a cache of its own in the same blocks, which every step of the target feeds.
N drafting sequences, B sequences of the batch, T tokens of the step, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sedac.contract.stats import DraftingStats
from sedac.engine.drafting import draws
from sedac.engine.drafting.acceptance import Acceptance
from sedac.engine.drafting.attention import DraftAttention
from sedac.engine.drafting.controller import Controller, Limits
from sedac.engine.drafting.heads import HeadCache, HeadLayer
from sedac.engine.drafting.model import DraftModel, make_layers, make_norm
from sedac.engine.drafting.native import NativeDraft
from sedac.engine.drafting.parts import (
    VllmConfig,
    keep_draft_probs,
    let_drafter_choose,
    process_weights_after_loading,
    set_current_vllm_config,
    set_default_torch_dtype,
    set_forward_context,
    set_model_tag,
)
from sedac.engine.drafting.totals import Totals
from sedac.errors import ConfigError, UnsupportedModel
from sedac.policy.model import FULL, Speculation
from sedac.probe.draft import REDUCED, load_head, read_draft_manifest
from sedac.probe.draft_manifest import check_fit

_log = logging.getLogger(__name__)
_HEAD_PREFIX = "sedac_draft.layers"


@dataclass(kw_only=True)
class _Step:
    """What the running step was, kept until its drafts are asked for."""

    num_tokens: int
    positions_T: Tensor
    slots_T: Tensor | None
    """of the head's layer; None where it has no cache"""
    request_ids: list[str]
    num_rows: int
    is_decode: bool
    num_drafts: list[int]
    """verified, by row"""


class Drafter:
    """Proposes drafts; see the module's docstring. The worker binds it to its runner after loading."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Read the manifest named by the layout.

        Raises:
            ArtifactError: it is missing or malformed.
            UnsupportedModel: the engine's layout can't draft.
        """
        parallel = vllm_config.parallel_config
        if parallel.tensor_parallel_size > 1 or parallel.data_parallel_size > 1:
            raise UnsupportedModel(
                f"tensor_parallel_size is {parallel.tensor_parallel_size}, data_parallel_size {parallel.data_parallel_size}; SEDAC's own drafts "
                "support 1: serve with `--draft none`, or with vLLM's own speculation (--speculative-config)"
            )
        if vllm_config.lora_config is not None:
            raise UnsupportedModel("LoRA reads its adapters by the rows of the running step, and a draft pass has others: serve with `--draft none`")
        self.vllm_config = vllm_config
        entry = vllm_config.additional_config.get("sedac") if isinstance(vllm_config.additional_config, dict) else None
        if not entry or not entry.get("draft"):
            raise ConfigError("SEDAC drafts are asked for, but no draft is named; start the engine with `sedac serve --draft DIR`")
        self.directory = Path(entry["draft"])
        self.manifest = read_draft_manifest(self.directory)
        entry["draft_sha256"] = hashlib.sha256((self.directory / "manifest.json").read_bytes()).hexdigest()
        speculative = vllm_config.speculative_config
        assert speculative is not None
        self.max_tokens: int = speculative.num_speculative_tokens
        self.controller = Controller()
        self.totals = Totals(self.max_tokens)
        self.head: HeadLayer | None = None
        self._attention: DraftAttention | None = None
        self._native: NativeDraft | None = None
        self._step: _Step | None = None
        self._generators: dict[str, torch.Generator] = {}
        self._acceptance = {samples: Acceptance() for samples in (False, True)}
        """by whether tokens are sampled"""
        self._unverified: dict[str, tuple[bool, list[float]]] = {}
        """by request: whether its drafts were sampled, and their confidences"""
        self._ended = 0.0
        self._last_ids: set[str] = set()
        self._draft_seconds, self._num_passes = 0.0, 0

    def load_model(self, target: Any) -> None:
        """Build the draft from the target's parts; called before KV caches are made.

        Raises:
            ArtifactError: the draft is of another model.
        """
        m, config = self.manifest, self.vllm_config.model_config
        text = config.hf_text_config
        self.target = target
        self.stream_TD: Tensor | None = getattr(target, "sedac_stream_TD", None)
        self._state = target.sedac_state
        self._level = 0
        check_fit(m, hidden_size=text.hidden_size, num_layers=text.num_hidden_layers, levels=self._state.table.names)
        if m.level != FULL:
            self._level = self._state.table.get_index(m.level)
        list_name, layers = target.sedac_layers
        inner = target.get_submodule(list_name.rpartition(".")[0])
        weights = load_head(self.directory, m)
        device = next(target.parameters()).device
        with set_current_vllm_config(self.vllm_config), set_default_torch_dtype(config.dtype), device, set_model_tag("sedac_draft"):
            norm: nn.Module | None = None
            if m.kind != REDUCED:
                self.head = HeadLayer(m, self.vllm_config, f"{_HEAD_PREFIX}.{text.num_hidden_layers}")
                self.head.load(weights)
                norm = make_norm(m, weights["norm.weight"])
                process_weights_after_loading(self.head, config, device)
            if self.head is not None and self.head.has_attention:
                with set_model_tag("sedac_draft_cache"):
                    self.head_cache = HeadCache(vllm_config=self.vllm_config, head=self.head)
            self.draft = DraftModel(vllm_config=self.vllm_config, inner=inner, layers=make_layers(layers, m, self.head), norm=norm)
        self._names = [f"{_HEAD_PREFIX}.{text.num_hidden_layers}.attn"] if self.head and self.head.has_attention else []
        prefix = f"{list_name}."
        for name in self.vllm_config.compilation_config.static_forward_context:
            if name.startswith(prefix) and int(name[len(prefix) :].split(".")[0]) < m.depth:
                self._names.append(name)

    def bind(self, runner: Any, requests: Any) -> None:
        """Take the runner's batch and the worker's requests as sources."""
        self.runner, self.requests = runner, requests
        let_drafter_choose(runner)

    def warm_up(self) -> None:
        """Make the native draft, or else compile the draft for two sequences and for one."""
        device = self.runner.device
        self._attention = DraftAttention(self.runner, self._names)
        try:
            if device.type != "cpu" or self._attention.num_groups != 1:
                raise ValueError("it is for the CPU and one kind of KV cache")
            self._native = NativeDraft(list(self.draft.inner.layers), self.draft.inner, self.draft.inner.norm, self.target, gated=self._level > 0)
        except ValueError as error:
            _log.info("draft passes run in torch, not natively: %s", error)
        if self._native is not None:
            return
        for num in (2, 1):
            ids_N = torch.zeros(num, dtype=torch.int32, device=device)
            with torch.inference_mode(), set_forward_context(None, self.vllm_config, num_tokens=num):
                self.draft(ids_N, ids_N.long())
                if self.stream_TD is not None:
                    self.head_cache(ids_N.long(), self.stream_TD[:num])

    def begin_step(
        self, request_ids: list[str], bounds: Any, positions_T: Tensor, slot_mappings: Any, drafts: dict[str, list[int]], is_decode: bool
    ) -> None:
        """Remember the step that the target has just computed, and the drafts (by request) that it verifies."""
        slots_T = None
        if self.head is not None and self.head.has_attention:
            slots_T = slot_mappings[self._names[0]]
        num_tokens = int(bounds[-1])
        self._step = _Step(
            num_tokens=num_tokens, positions_T=positions_T, slots_T=slots_T, request_ids=list(request_ids), num_rows=num_tokens, is_decode=is_decode,
            num_drafts=[len(drafts.get(i, ())) for i in request_ids],
        )  # fmt: skip

    @torch.inference_mode()
    def propose(self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, slot_mappings: Any = None) -> list[list[int]]:
        """Return draft tokens for each row of the batch; none for rows that still read their prompt or may not speculate."""
        step, self._step = self._step, None
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        if step is None:
            return drafts
        if step.slots_T is not None:
            assert self.head is not None
            assert self.stream_TD is not None
            num = step.num_tokens
            if self._native is not None:
                self._native.fill(self.stream_TD[:num], step.positions_T[:num], step.slots_T[:num])
            else:
                keys, values = self.head_cache(step.positions_T[:num], self.stream_TD[:num])
                self.head.write_cache(keys, values, step.slots_T[:num])
        if any(step.num_drafts):
            self._learn_acceptance(step, sampled_token_ids)
            self.totals.count_verified([(drafted, len(ids) - 1) for drafted, ids in zip(step.num_drafts, sampled_token_ids, strict=True) if ids])
        else:
            self._unverified.clear()
            self.totals.count_undrafted(sum(1 for ids in sampled_token_ids if ids))
        self._learn(step, sampled_token_ids)
        began = time.perf_counter()
        self._num_passes = 0
        rows, lengths, limits = self._choose(sampled_token_ids, num_tokens_no_spec)
        if rows:
            self._draft(drafts, rows, lengths, limits, num_tokens_no_spec, token_ids_cpu)
        ended = time.perf_counter()
        self._draft_seconds = ended - began if rows else 0.0
        self.totals.count_drafting(self._num_passes, self._draft_seconds)
        self._ended = ended
        return drafts

    def _learn_acceptance(self, step: _Step, sampled_token_ids: list[list[int]]) -> None:
        for request_id, drafted, ids in zip(step.request_ids, step.num_drafts, sampled_token_ids, strict=True):
            samples, confidences = self._unverified.pop(request_id, (False, []))
            if drafted and ids:
                self._acceptance[samples].learn(confidences[:drafted], len(ids) - 1)

    def _learn(self, step: _Step, sampled_token_ids: list[list[int]]) -> None:
        """Hand what the last step took to the controller; gaps in which no request went on are no step."""
        counts = [len(ids) for ids in sampled_token_ids]
        seconds = time.perf_counter() - self._ended + self._draft_seconds
        ids = set(step.request_ids)
        goes_on = self._ended > 0 and not ids.isdisjoint(self._last_ids)
        if goes_on:
            self.totals.count_step(seconds)
        if goes_on and step.is_decode and len(step.request_ids) == len(self._last_ids):
            self.controller.learn(
                num_sequences=len(counts),
                num_rows=step.num_rows,
                num_tokens=sum(counts),
                seconds=seconds,
                draft_seconds=self._draft_seconds,
                num_passes=self._num_passes,
            )
        self._last_ids = ids

    def _choose(self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any) -> tuple[list[int], list[int], Limits]:
        """Return the rows that draft, how many tokens each may, and the stopping rules."""
        found = self._walk_rooms(sampled_token_ids, num_tokens_no_spec)
        first = next(found, None)
        if first is None:
            return [], [], Limits(max_tokens=0, min_confidence=1.0)
        knobs = first[2]
        own = self.manifest.min_confidence if knobs.min_confidence is None else knobs.min_confidence
        limits = self.controller.choose(len(sampled_token_ids), max_tokens=self.max_tokens, min_confidence=own, adaptive=knobs.adaptive)
        if limits.max_tokens == 0:
            return [], [], limits
        rooms = [first, *found]
        return [row for row, _, _ in rooms], [min(room, limits.max_tokens) for _, room, _ in rooms], limits

    def _walk_rooms(self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any) -> Iterator[tuple[int, int, Speculation]]:
        """Yield each row that may draft, how many tokens, and its knobs."""
        requests = self.runner.requests
        for row, request_id in enumerate(self.runner.input_batch.req_ids):
            speculation = self.requests.get_speculation(request_id) if sampled_token_ids[row] else None
            if speculation is not None:
                room = self._get_room(requests[request_id], int(num_tokens_no_spec[row]), speculation)
                if room > 0:
                    yield row, room, speculation

    def _get_room(self, state: Any, num_tokens: int, speculation: Speculation) -> int:
        """Return how many tokens may be drafted after the request's first `num_tokens`, before the controller is asked."""
        params, num_generated = state.sampling_params, len(state.output_token_ids)
        room = min(
            self.max_model_len - num_tokens,
            (params.max_tokens or self.max_model_len) - num_generated - 1,
            speculation.max_tokens or min(self.manifest.max_tokens, self.max_tokens),
            self.max_tokens,
        )
        if num_generated < params.min_tokens:
            # vLLM (0.32) forbids a stop to the token after the last draft by the tokens before the first one: none may lie behind min_tokens
            room = min(room, params.min_tokens - num_generated - 1)
        return int(room)

    def _draft(
        self, drafts: list[list[int]], rows: list[int], lengths: list[int], limits: Limits, num_tokens_no_spec: Any, token_ids_cpu: Any
    ) -> None:
        """Run draft passes until every sequence has stopped; fills `drafts`."""
        runner, batch, device = self.runner, self.runner.input_batch, self.runner.device
        attention = self._attention
        assert attention is not None
        last = num_tokens_no_spec[rows].astype(np.int64) - 1
        ids_N = torch.from_numpy(token_ids_cpu[rows, last].astype(np.int32)).to(device)
        positions_N = torch.from_numpy(last).to(device)
        max_position = int(last.max())
        attention.begin(None if len(rows) == batch.num_reqs else rows)
        sampling = draws.Draws.from_batch(batch.sampling_metadata, rows, batch.num_reqs, self._get_generators(rows))
        probs_BKV: Tensor | None = None
        live = list(range(len(rows)))
        joints = [1.0] * len(rows)
        samples = [False] * len(rows) if sampling is None else (sampling.temperature_N > 0).tolist()
        confidences: list[list[float]] = [[] for _ in rows]
        total, num_drafted = 0.0, 0
        restore = self._state.begin_draft(self._level, len(rows)) if self._level else None
        for position in range(max(lengths)):
            metadata, slots = attention.build(positions_N, max_position)
            if self._native is not None:
                logits_NV = self._native.run(ids_N, positions_N, metadata[self._names[0]])
            else:
                with set_forward_context(metadata, self.vllm_config, num_tokens=len(live), slot_mapping=slots):
                    logits_NV = self.draft(ids_N, positions_N)
            if self._native is None or not self._native.num_outputs:
                logits_NV = self.target.compute_logits(logits_NV)
            tokens_N, confidence_N, probs_NV = draws.draw(logits_NV, sampling)
            self._num_passes += 1
            if probs_NV is not None:
                if probs_BKV is None:
                    probs_BKV = torch.zeros(len(rows), max(lengths), logits_NV.shape[-1], device=device)
                probs_BKV[live, position] = probs_NV
            for number, token, value in zip(live, tokens_N.tolist(), confidence_N.tolist(), strict=True):
                drafts[rows[number]].append(token)
                confidences[number].append(value)
                expected = self._acceptance[samples[number]].get(value) if limits.is_adaptive else value
                joints[number] *= expected
                total += expected
                num_drafted += 1
            kept = [i for i, number in enumerate(live) if joints[number] >= limits.min_confidence and position + 1 < lengths[number]]
            if not kept or sum(joints[live[i]] for i in kept) < limits.min_sum:
                break
            if len(kept) < len(live):
                index_N = torch.tensor(kept, device=device)
                tokens_N, positions_N = tokens_N[index_N], positions_N[index_N]
                attention.keep(index_N)
                sampling = sampling.keep(kept) if sampling else None
                live = [live[i] for i in kept]
            ids_N, positions_N, max_position = tokens_N.int(), positions_N + 1, max_position + 1
        if restore is not None:
            restore()
        if probs_BKV is not None:
            keep_draft_probs(runner, probs_BKV, [batch.req_ids[row] for row in rows])
        self._unverified = {batch.req_ids[row]: (samples[i], confidences[i]) for i, row in enumerate(rows)}
        self.controller.learn_confidence(batch.num_reqs, total / num_drafted)

    def _get_generators(self, rows: list[int]) -> dict[int, torch.Generator]:
        """Return the generators of the rows whose requests have a seed, by number."""
        batch = self.runner.input_batch
        found = {}
        for number, row in enumerate(rows):
            if row in batch.generators:
                request_id = batch.req_ids[row]
                if request_id not in self._generators:
                    seed = self.runner.requests[request_id].sampling_params.seed or 0
                    self._generators[request_id] = draws.make_generator(seed, self.runner.device)
                found[number] = self._generators[request_id]
        return found

    def forget(self, request_ids: Any) -> None:
        """Drop what was kept of finished requests."""
        for request_id in request_ids:
            self._generators.pop(request_id, None)

    @property
    def max_model_len(self) -> int:
        """Positions that a sequence may have."""
        return int(self.runner.max_model_len)

    def get_stats(self) -> DraftingStats:
        """Return the totals and the controller's state."""
        return self.totals.get_stats(self.manifest.kind, self.controller.get_stats())
