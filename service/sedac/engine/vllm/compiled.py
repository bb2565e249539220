"""What vLLM 0.32 must know of SEDAC, and has wrong, where it keeps compiled models on disk; called by SEDAC's worker before it compiles.

- On the CPU vLLM saves what it has compiled and can't load it again: it calls `finalize_loading` of all that it loads
  (compilation/decorators.py), which only the compiled models of its own backend have; those of the CPU are torch's. Plain vLLM compiles
  anew at every start for that reason.
- What it saves goes by the name of the configuration. The graph depends on more: what the probe set's files hold, which native kernels
  there are, and the processor, for which vLLM packs the weights and the compiler writes its code, for so many threads
  (torch/_inductor/codegen/cpp.py, 2.13: `num_threads`). A digest of it becomes part of the configuration.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from sedac.engine.vllm.config import find_entry
from sedac.engine.vllm.processor import describe_processor
from sedac.policy.layout import Layout

GRAPH_KEY = "graph_sha256"
"""Key of SEDAC's entry in the configuration that holds the digest."""


def prepare(vllm_config: Any, model: nn.Module, layout: Layout) -> None:
    """Let a compiled model be loaded again, and only for a model with the same parts; before it is compiled, after its weights are packed."""
    entry = find_entry(vllm_config)
    assert entry is not None
    entry[GRAPH_KEY] = make_digest(model, layout)
    _let_load()


def make_digest(model: nn.Module, layout: Layout) -> str:
    """Return a digest of what compiled code depends on beside vLLM's configuration: processor, threads, each module and how it multiplies."""
    parts = [repr(layout), describe_processor(), f"{torch.get_num_threads()} threads"]
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        gated = getattr(method, "gated", None)
        parts.append(f"{name} {_name(type(module))} {_name(type(method))} {_name(getattr(module, 'cpu_linear', None))} {_list_flags(gated)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _name(found: Any) -> str:
    return f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"


def _list_flags(found: Any) -> list[str]:
    return sorted(f"{name}={value}" for name, value in getattr(found, "__dict__", {}).items() if isinstance(value, bool))


def _let_load() -> None:
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable

    loaded: Any = BundledAOTAutogradSerializableCallable
    if not hasattr(loaded, "finalize_loading"):
        loaded.finalize_loading = lambda self, vllm_config: None  # it is complete
