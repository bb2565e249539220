"""vLLM's registry of architectures: SEDAC's classes are put into it by name, and looked up in it when a model is built."""

from __future__ import annotations

import importlib
from typing import Any


def register_models() -> None:
    """Put `Sedac<architecture>` in the place of every text-generation architecture; nothing of it is imported before it is built."""
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS, ModelRegistry

    for architecture in _TEXT_GENERATION_MODELS:
        ModelRegistry.register_model(architecture, f"sedac.engine.attach.models:Sedac{architecture}")


def find_module(architecture: str) -> Any:
    """Import the module that defines an architecture; None: vLLM generates no text with it."""
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    if architecture not in _TEXT_GENERATION_MODELS:
        return None
    return importlib.import_module(f"vllm.model_executor.models.{_TEXT_GENERATION_MODELS[architecture][0]}")


def find_class(architecture: str) -> Any:
    """Return vLLM's own class of an architecture; None: vLLM generates no text with it."""
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    module = find_module(architecture)
    return None if module is None else getattr(module, _TEXT_GENERATION_MODELS[architecture][1])
