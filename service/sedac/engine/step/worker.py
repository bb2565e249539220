"""The worker: vLLM's own, plus SEDAC's step boundaries and the remote calls `sedac_*`.

Named by `--worker-cls sedac.engine.step.worker.SedacWorker`. Remote calls run on the same queue and thread as forward passes,
so a policy changes between two passes, never within one.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sedac.engine.drafting.drafter import Drafter
from sedac.engine.step.record import NO_TOKEN, Recorder
from sedac.engine.step.requests import Requests
from sedac.engine.step.state import State
from sedac.engine.vllm import compiled, runner, sampling, speculation
from sedac.engine.vllm.parts import is_compiled
from sedac.errors import ConfigError, PolicyInvalid, UnsupportedModel
from sedac.policy.model import Candidate, Policy

_log = logging.getLogger(__name__)


class SedacWorker(runner.BaseWorker):
    """A vLLM worker whose model carries a SEDAC `State`."""

    sedac_state: State
    sedac_drafter: Drafter | None = None
    """None where this engine drafts with another method of vLLM, or not at all."""

    def init_device(self) -> Any:
        """Make the device and the runner ready."""
        speculation.restore_processors()
        return super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model and make sure that SEDAC is attached to it.

        Raises:
            UnsupportedModel: the model's class is not one that SEDAC can attach to.
            ConfigError: the engine was started without SEDAC's layout.
        """
        super().load_model(*args, **kwargs)
        sampling.mend_seeds(self.model_runner)
        if self.vllm_config.speculative_config is not None:
            sampling.mend()
            sampling.skip_empty_verification(self.model_runner)
        model = self.model_runner.get_model()
        if not hasattr(model, "sedac_state"):
            raise UnsupportedModel(
                f"{type(model).__name__} is not a text-generation architecture that SEDAC attaches to, or the plugin `sedac` is missing from "
                "VLLM_PLUGINS; `sedac doctor` tells which"
            )
        if model.sedac_state is None:
            raise ConfigError("SedacWorker needs the layout in --additional-config; start the engine with `sedac serve`")
        self.sedac_state = model.sedac_state
        self._sedac_requests = Requests(self.sedac_state)
        self._sedac_in_step = False
        backend = self.sedac_state.backend
        for gated in backend.mlps:
            backend.finish_mlp(gated.module)
        drafter = getattr(self.model_runner, "drafter", None)
        self.sedac_drafter = drafter if isinstance(drafter, Drafter) else None
        if self.sedac_drafter is not None:
            self.sedac_drafter.bind(self.model_runner, self._sedac_requests)
        layout = self.sedac_state.layout
        compiled.prepare(self.vllm_config, model, layout)
        _log.info(
            "SEDAC attached to %s: %d layers, checkpoints after %s, probe set %r (room for rank %d), levels %s, %s kernels%s",
            type(model).__name__.removeprefix("Sedac"),
            layout.num_layers,
            ", ".join(map(str, layout.checkpoint_layers)) or "none",
            layout.probe_set,
            layout.max_rank,
            ", ".join(layout.levels),
            backend.label,
            ", recording" if self.sedac_state.recorder else "",
        )
        runner.wrap_forward(self.model_runner, self._sedac_forward)

    def compile_or_warm_up_model(self) -> Any:
        """Warm up, and also the gated MLPs at the sizes that only exits bring."""
        result = super().compile_or_warm_up_model()
        if self.sedac_drafter is not None:
            self.sedac_drafter.warm_up()
        state = self.sedac_state
        state.backend.warm_up(state.layout.hidden_size, self.model_config.dtype, is_compiled=is_compiled(self.vllm_config))
        return result

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one step, remembering what each new request asked for."""
        for new in scheduler_output.scheduled_new_reqs:
            if self._sedac_requests.has(new.req_id):
                self.sedac_state.settle()  # the one before it under this id has finished, but was not counted
            extra = new.sampling_params.extra_args if new.sampling_params else None
            self._sedac_requests.add(new.req_id, extra or {}, may_draft=sampling.can_verify(new.sampling_params))
        if scheduler_output.finished_req_ids:
            self.sedac_state.count_repeats()
            self.sedac_state.backend.then(self._sedac_finish, scheduler_output.finished_req_ids)
        if self.sedac_drafter is not None:
            self.sedac_drafter.forget(scheduler_output.finished_req_ids)
            self._sedac_drafts = scheduler_output.scheduled_spec_decode_tokens
        self._sedac_scheduled, self._sedac_in_step = scheduler_output.num_scheduled_tokens, scheduler_output.total_num_scheduled_tokens > 0
        try:
            return super().execute_model(scheduler_output, *args, **kwargs)
        finally:
            self._sedac_in_step = False

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, draft, and send the drafts along (see engine/vllm/speculation.py)."""
        result = super().sample_tokens(grammar_output)
        if self.sedac_drafter is not None and isinstance(result, runner.ModelRunnerOutput):
            drafts = self.take_draft_token_ids()
            setattr(result, speculation.DRAFTS, drafts if drafts is not None and any(drafts.draft_token_ids) else None)
        return result

    def _sedac_finish(self, request_ids: set[str], saved_T: np.ndarray[Any, Any] | None) -> None:
        self._sedac_requests.finish(request_ids)

    def _sedac_forward(self, forward: Any, **inputs: Any) -> Any:
        """Wrap the model's forward pass in a step; dummy and profile runs pass through."""
        if not self._sedac_in_step:
            return forward(**inputs)
        state = self.sedac_state
        if state.recorder is None and not (self._sedac_requests.num_bounded and state.is_enabled):
            hidden = self._sedac_compute_plain(forward, inputs)
        else:
            hidden = self._sedac_compute(forward, inputs)
        if self.sedac_drafter is not None:
            batch = runner.read_batch(self.model_runner)
            is_decode = bool((batch.starts >= batch.num_prompt).all())
            slots = runner.get_slot_mapping()
            self.sedac_drafter.begin_step(batch.request_ids, batch.bounds, inputs["positions"], slots, self._sedac_drafts, is_decode)
        if state.recorder is not None:
            self._sedac_record(state.recorder, hidden)
        return hidden

    def _sedac_compute_plain(self, forward: Any, inputs: dict[str, Any]) -> Any:
        """Compute a step in which nothing may be reduced, with no work of SEDAC's beside the counting."""
        state, scheduled = self.sedac_state, self._sedac_scheduled
        state.begin_plain(sum(scheduled.values()))
        try:
            return forward(**inputs)
        finally:
            state.end_step()
            self._sedac_requests.count_plain(scheduled)

    def _sedac_compute(self, forward: Any, inputs: dict[str, Any]) -> Any:
        """Compute a step in which tokens may be reduced, or that is recorded."""
        state, requests, batch = self.sedac_state, self._sedac_requests, runner.read_batch(self.model_runner)
        bounds, request_ids = batch.bounds, batch.request_ids
        tokens = requests.make_tokens(request_ids, bounds, batch.num_prompt, batch.starts) if state.is_enabled else None
        is_repeat = state.begin_repeat(tokens) if tokens is not None else False
        if not is_repeat:
            state.begin_step(int(bounds[-1]), tokens)
        try:
            return forward(**inputs)
        finally:
            if is_repeat:
                state.end_repeat()
            else:
                state.end_step()
                state.backend.then(requests.count_step, request_ids, bounds)

    def _sedac_record(self, recorder: Recorder, hidden: Any) -> None:
        """Record the step that was computed."""
        batch = runner.read_batch(self.model_runner)
        starts, counts = batch.starts, np.diff(batch.bounds)
        parts = [(r, int(starts[i]), int(counts[i])) for i, r in enumerate(batch.request_ids)]
        next_T = torch.cat([runner.get_next_tokens(self.model_runner, i, start, count, NO_TOKEN) for i, (_, start, count) in enumerate(parts)])
        recorder.finish_step(parts, next_T, hidden, self.model_runner.model.compute_logits)

    def sedac_describe(self) -> dict[str, Any]:
        """Return what is attached: the layout as a dict."""
        return asdict(self.sedac_state.layout)

    def sedac_get_faster_rows(self) -> dict[str, int]:
        """Return up to how many rows each reduced level is faster than full here; see `Backend.get_faster_rows`."""
        return self.sedac_state.backend.get_faster_rows()

    def sedac_preload(self, directory: str, sha256: str) -> None:
        """Start reading and verifying the probe set in `directory`, whose weights have this digest; returns at once, steps go on."""
        self.sedac_state.probe_sets.preload(Path(directory), sha256)

    def sedac_preloaded(self, sha256: str) -> dict[str, Any]:
        """Return how far a preloaded set is; see `ProbeSets.get_state`."""
        return self.sedac_state.probe_sets.get_state(sha256)

    def sedac_apply(self, policy: dict[str, Any], revision: int, candidate: dict[str, Any] | None = None) -> dict[str, Any]:
        """Put a policy (`Policy.to_dict`), a candidate beside it (`Candidate.to_dict`) and their probe sets into force, all at once.

        Probe sets are named among the attached and the preloaded ones; preloaded ones that nothing names any more are forgotten.
        A refusal lists its violations and leaves everything as it was.
        """
        state, violations = self.sedac_state, []
        beside = Candidate(**{**candidate, "policy": Policy.from_dict(candidate["policy"])}) if candidate else None
        try:
            state.apply(Policy.from_dict(policy), revision, beside)
        except PolicyInvalid as error:
            violations = [(v.field, v.description) for v in error.violations]
        return {"revision": state.revision, "rollout": state.rollout, "violations": violations}

    def sedac_get_stats(self) -> dict[str, Any]:
        """Return the totals since the worker started (`Stats` as a dict)."""
        stats = self.sedac_state.get_stats()
        return asdict(replace(stats, drafting=self.sedac_drafter.get_stats()) if self.sedac_drafter else stats)

    def sedac_get_report(self, request_id: str) -> dict[str, Any] | None:
        """Return what a running or recently finished request was computed with; None where it is unknown."""
        self.sedac_state.settle()
        return self._sedac_requests.get_report(request_id)

    def sedac_take_records(self) -> list[dict[str, Any]]:
        """Return and forget what was recorded since the last call; see `Recorder.finish_step`.

        Raises:
            ConfigError: the engine does not record.
        """
        return self._sedac_get_recorder().take()

    def sedac_take_statistics(self) -> dict[str, Any]:
        """Return and forget the sums per neuron since the last call, of this rank's share; see `Recorder.take_statistics`.

        Raises:
            ConfigError: the engine does not record.
        """
        return self._sedac_get_recorder().take_statistics()

    def sedac_keep_streams(self, layers: list[int]) -> None:
        """Record from now on the streams after these layers only, of those that have a checkpoint.

        Raises:
            ConfigError: the engine does not record.
        """
        self._sedac_get_recorder().layers = frozenset(layers)

    def _sedac_get_recorder(self) -> Recorder:
        if self.sedac_state.recorder is None:
            raise ConfigError('this engine does not record; start it with --additional-config \'{"sedac": {"record": true, ...}}\'')
        return self.sedac_state.recorder
