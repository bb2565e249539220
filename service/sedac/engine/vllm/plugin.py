"""Entry point of `vllm.general_plugins`: registers SEDAC's model classes.

vLLM calls `register` in the front end, the engine core, every worker and the process that inspects models, whether SEDAC was asked for or
not. It only writes names into vLLM's registry; nothing heavy is imported until a model is built. With a vLLM that SEDAC was not built for
it changes nothing, warns once, and refuses engines whose configuration asks for SEDAC.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from sedac.engine.vllm import patches
from sedac.engine.vllm.config import find_entry
from sedac.engine.vllm.registry import register_models
from sedac.engine.vllm.speculation import prepare
from sedac.errors import UnsupportedModel
from sedac.versions import stand_aside

_log = logging.getLogger(__name__)


def register() -> None:
    """Register a SEDAC subclass for every text-generation architecture of vLLM, or stand aside; never raises."""
    reason = patches.why_not("every process")
    if not reason:
        _share_vllm_log()
        register_models()
        prepare()
        return
    try:
        _share_vllm_log()
        _refuse_engines(reason)
    except Exception as error:  # noqa: BLE001  whatever is missing of another vLLM, it serves without SEDAC
        _log.debug("vLLM can't be watched for engines that ask for SEDAC: %s", error)
    stand_aside(reason)


def _refuse_engines(reason: str) -> None:
    """Refuse every engine that is configured with a `sedac` entry in this process: it would serve without what it asks for."""
    from vllm.config import VllmConfig

    finish: Any = VllmConfig.__post_init__

    @functools.wraps(finish)
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse a configuration that asks for SEDAC, and finish any other."""
        if find_entry(self) is not None:
            raise UnsupportedModel(reason)
        finish(self, *args, **kwargs)

    VllmConfig.__post_init__ = refuse


def _share_vllm_log() -> None:
    """Let SEDAC's log lines out where vLLM's go: its processes configure the logger `vllm` alone."""
    import vllm.logger  # noqa: F401  configures it

    ours, theirs = logging.getLogger("sedac"), logging.getLogger("vllm")
    if not ours.handlers and not logging.getLogger().handlers:
        ours.handlers, ours.propagate = list(theirs.handlers), False
        ours.setLevel(theirs.level)
