"""What vLLM calls after each step to get draft tokens: its proposer interface `custom_class` (v1/spec_decode/custom_class_proposer.py, 0.32).

The draft runs on the target's own KV cache. What it writes there for the layers that it runs, verification writes again before any
layer reads it, so a draft never changes what the target computes; slots past a sequence's own blocks are reserved by
`engine/vllm/speculation.py`. A head with attention has a cache of its own in the same blocks, which every step of the target feeds.
N drafting sequences, K draft tokens of each at most, T tokens of the step, V vocabulary.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedac.contract.stats import DraftingStats
from sedac.engine.drafting import draws
from sedac.engine.drafting.acceptance import Acceptance
from sedac.engine.drafting.controller import Controller, Limits
from sedac.engine.drafting.parts import VllmConfig, keep_draft_probs, let_drafter_choose
from sedac.engine.drafting.passes import Passes
from sedac.engine.drafting.totals import Totals
from sedac.errors import ConfigError, UnsupportedModel
from sedac.policy.model import Speculation
from sedac.probe.draft import read_draft_manifest


@dataclass(kw_only=True)
class _Step:
    """What the running step was, kept until its drafts are asked for."""

    num_tokens: int
    positions_T: Tensor
    slots_T: Tensor | None
    """Cache slots of the tokens in the head's layer. None where it has no cache."""
    request_ids: list[str]
    num_rows: int
    is_decode: bool
    num_drafts: list[int]
    """Number of drafts verified, by row."""


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
        self._step: _Step | None = None
        self._generators: dict[str, torch.Generator] = {}
        self._acceptance = {samples: Acceptance() for samples in (False, True)}
        """Expected acceptance, by whether tokens are sampled."""
        self._unverified: dict[str, tuple[bool, list[float]]] = {}
        """Whether a request's drafts were sampled, and their confidences, by request."""
        self._ended = 0.0
        self._last_ids: set[str] = set()
        self._draft_seconds, self._num_passes = 0.0, 0

    def load_model(self, target: Any) -> None:
        """Build the draft from the target's parts; called before KV caches are made.

        Raises:
            ArtifactError: the draft is of another model.
        """
        self.passes = Passes(self.vllm_config, self.manifest, self.directory, target)

    def bind(self, runner: Any, requests: Any) -> None:
        """Take the runner's batch and the worker's requests as sources."""
        self.runner, self.requests = runner, requests
        let_drafter_choose(runner)

    def warm_up(self) -> None:
        """Make the passes ready; KV caches exist."""
        self.passes.warm_up(self.runner)

    def begin_step(
        self, request_ids: list[str], bounds: Any, positions_T: Tensor, slot_mappings: Any, drafts: dict[str, list[int]], is_decode: bool
    ) -> None:
        """Remember the step that the target has just computed, and the drafts (by request) that it verifies."""
        name = self.passes.cache_name
        slots_T = None if name is None else slot_mappings[name]
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
            num = step.num_tokens
            self.passes.fill(step.positions_T[:num], step.slots_T[:num])
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
        last = num_tokens_no_spec[rows].astype(np.int64) - 1
        ids_N = torch.from_numpy(token_ids_cpu[rows, last].astype(np.int32)).to(device)
        positions_N = torch.from_numpy(last).to(device)
        sampling = draws.Draws.from_batch(batch.sampling_metadata, rows, batch.num_reqs, self._get_generators(rows))
        samples = [False] * len(rows) if sampling is None else (sampling.temperature_N > 0).tolist()

        def expect(is_sampled: bool, confidence: float) -> float:
            """Return the expected acceptance of a draft token, or its confidence where limits are not adaptive."""
            return self._acceptance[is_sampled].get(confidence) if limits.is_adaptive else confidence

        drafted = self.passes.run(
            ids_N, positions_N, max_position=int(last.max()), rows=None if len(rows) == batch.num_reqs else rows, lengths=lengths, limits=limits,
            sampling=sampling, samples=samples, expect=expect,
        )  # fmt: skip
        self._num_passes = drafted.num_passes
        for row, tokens in zip(rows, drafted.tokens, strict=True):
            drafts[row].extend(tokens)
        if drafted.probs_NKV is not None:
            keep_draft_probs(runner, drafted.probs_NKV, [batch.req_ids[row] for row in rows])
        self._unverified = {batch.req_ids[row]: (samples[i], drafted.confidences[i]) for i, row in enumerate(rows)}
        self.controller.learn_confidence(batch.num_reqs, sum(drafted.expected) / len(drafted.expected))

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
