"""Subclasses of vLLM's model classes that attach SEDAC in `__init__`: one per architecture, made on demand.

vLLM's registry asks this module for `Sedac<Class>` (see engine/vllm/registry.py). Without a `sedac` entry in `--additional-config` such a
class is exactly its base, and nothing else of SEDAC's engine is imported: what that is built from may differ in another vLLM. With one,
attach.py gives decoder layers and MLPs their gated classes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sedac.engine.vllm.config import StaticConfig
from sedac.engine.vllm.registry import find_class


def __getattr__(name: str) -> type[nn.Module]:
    """Make `Sedac<architecture>` for the architecture that vLLM's registry knows under that name."""
    architecture = name.removeprefix("Sedac")
    found = find_class(architecture) if architecture != name else None
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base: Any = found

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:  # noqa: N807
        base.__init__(self, vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.sedac_state = None
        if StaticConfig.from_vllm(vllm_config) is not None:
            from sedac.engine.attach.attach import attach

            self.sedac_state = attach(self, vllm_config)

    made = type(name, (base,), {"__init__": __init__, "__module__": __name__})
    globals()[name] = made
    return made
