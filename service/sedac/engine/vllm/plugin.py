"""Entry point of `vllm.general_plugins`: registers SEDAC's model classes.

vLLM calls `register` in the front end, the engine core, every worker and the process that inspects models. It only writes
names into vLLM's registry; nothing heavy is imported until a model is built.
"""

from __future__ import annotations

import logging

from sedac.versions import find_vllm_version


def register() -> None:
    """Register a SEDAC subclass for every text-generation architecture of vLLM.

    Raises:
        UnsupportedModel: this vLLM is not the minor version that SEDAC was built against.
    """
    find_vllm_version()
    _share_vllm_log()
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS, ModelRegistry

    from sedac.engine.drafting.setup import prepare

    for architecture in _TEXT_GENERATION_MODELS:
        ModelRegistry.register_model(architecture, f"sedac.engine.vllm.models:Sedac{architecture}")
    prepare()


def _share_vllm_log() -> None:
    """Let SEDAC's log lines out where vLLM's go: its processes configure the logger `vllm` alone."""
    import vllm.logger  # noqa: F401  configures it

    ours, theirs = logging.getLogger("sedac"), logging.getLogger("vllm")
    if not ours.handlers and not logging.getLogger().handlers:
        ours.handlers, ours.propagate = list(theirs.handlers), False
        ours.setLevel(theirs.level)
