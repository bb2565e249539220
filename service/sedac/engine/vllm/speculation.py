"""What vLLM 0.32 must know of SEDAC's drafts and has no setting for; called by the plugin in every process, changes nothing for other methods.

An engine's configuration passes here when it is made, so that one which asks for SEDAC is checked before anything of it starts.

- Drafts of `custom_class` get no slots of their own (`VllmConfig.num_lookahead_tokens` is 0): those past a block's edge would be written
  elsewhere. They get as many as a draft model's.
- A sequence that joins with one token to compute gets draft tokens that nobody proposed, for the sake of CUDA graphs of one shape
  (v1/core/sched/scheduler.py); where lengths are said to depend on the size of the batch, it gets none.
- Requests with min_p or logit_bias are refused, and custom logits processors too, because the rejection sampler does not apply them. SEDAC
  drafts nothing for such requests, so that the usual sampler serves them.
- After each step vLLM asks the worker's process for drafts (v1/engine/core.py), though they were made within the step: they come with its
  result instead, which saves a message there and back.
"""

from __future__ import annotations

import functools
from typing import Any

from sedac.engine.vllm import patches
from sedac.engine.vllm.config import find_entry

DRAFTER = "sedac.engine.drafting.drafter.Drafter"
"""Value of `model` in the speculative configuration."""
DRAFTS = "sedac_drafts"
"""Attribute of a step's result (ModelRunnerOutput): the drafts made in it, or None."""


def is_ours(speculative: Any) -> bool:
    """Whether a speculative configuration (None: there is none) names SEDAC's drafts."""
    return speculative is not None and speculative.method == "custom_class" and speculative.model == DRAFTER


def prepare() -> None:
    """Put all of it in place, once per process."""
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

    if getattr(VllmConfig.num_lookahead_tokens.fget, "sedac", False):
        return
    count_slots: Any = VllmConfig.num_lookahead_tokens.fget
    finish: Any = VllmConfig.__post_init__
    check: Any = SamplingParams._validate_spec_decode

    @functools.wraps(count_slots)
    def count(self: Any) -> int:
        """Return the number of slots to keep free for drafts."""
        return int(self.num_speculative_tokens if is_ours(self.speculative_config) else count_slots(self))

    @functools.wraps(finish)
    def finish_config(self: Any, *args: Any, **kwargs: Any) -> None:
        """Check what SEDAC relies on where it is asked for, and finish the configuration."""
        if find_entry(self) is not None:
            patches.refuse("front end")
        finish(self, *args, **kwargs)
        if is_ours(self.speculative_config):
            self.speculative_config.num_speculative_tokens_per_batch_size = [(1, 1, self.num_speculative_tokens)]

    @functools.wraps(check)
    def validate(self: Any, speculative_config: Any) -> None:
        """Let vLLM check a request, except where the drafts are SEDAC's."""
        if not is_ours(speculative_config):
            check(self, speculative_config)

    count.sedac = True  # type: ignore[attr-defined]
    VllmConfig.num_lookahead_tokens = property(count)
    VllmConfig.__post_init__ = finish_config
    SamplingParams._validate_spec_decode = validate
    _take_drafts_from_results()


def _take_drafts_from_results() -> None:
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    sample: Any = MultiprocExecutor.sample_tokens
    ask: Any = MultiprocExecutor.take_draft_token_ids

    @functools.wraps(sample)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Sample, and keep the drafts that come with the result."""
        result = sample(self, *args, **kwargs)
        vars(self).pop(DRAFTS, None)
        if hasattr(result, DRAFTS):
            setattr(self, DRAFTS, getattr(result, DRAFTS))
        return result

    @functools.wraps(ask)
    def take_draft_token_ids(self: Any) -> Any:
        """Return the drafts that came with the result, or ask for them."""
        return vars(self).pop(DRAFTS) if DRAFTS in vars(self) else ask(self)

    executor: Any = MultiprocExecutor
    executor.sample_tokens, executor.take_draft_token_ids = sample_tokens, take_draft_token_ids


def restore_processors() -> None:
    """Let the runner build all logits processors, not only those that the rejection sampler knows; before the runner is made."""
    from vllm.v1.worker import gpu_model_runner

    build = gpu_model_runner.build_logitsprocs
    if getattr(build, "sedac", False):
        return

    @functools.wraps(build)
    def build_all(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Build the processors; with SEDAC's drafts, as without speculation."""
        custom = args[3] if len(args) > 3 else kwargs.get("custom_logitsprocs")
        if custom or not is_ours(vllm_config.speculative_config):  # vLLM refuses custom ones by name: nobody knows whom they concern
            return build(vllm_config, *args, **kwargs)
        speculative, vllm_config.speculative_config = vllm_config.speculative_config, None
        try:
            return build(vllm_config, *args, **kwargs)
        finally:
            vllm_config.speculative_config = speculative

    build_all.sedac = True  # type: ignore[attr-defined]
    gpu_model_runner.build_logitsprocs = build_all
