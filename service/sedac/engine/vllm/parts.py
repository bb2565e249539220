"""Parts of vLLM that SEDAC's step and backends are built from, under one roof: whoever moves to another vLLM looks here and in patches.py."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from sedac.engine.vllm.patches import named

with named():
    from vllm.config import VllmConfig
    from vllm.config.compilation import CompilationMode
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.utils.torch_utils import direct_register_custom_op

__all__ = [
    "Attention",
    "RMSNorm",
    "UnquantizedLinearMethod",
    "VllmConfig",
    "direct_register_custom_op",
    "find_handler",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "is_compiled",
    "tensor_model_parallel_all_reduce",
]


def is_compiled(vllm_config: VllmConfig) -> bool:
    """Whether the model runs under torch.compile."""
    return bool(vllm_config.compilation_config.mode != CompilationMode.NONE)


def find_handler(layer: Any) -> Tensor | None:
    """Return the oneDNN handler that vLLM packed a layer's weights into; None where it took another kernel."""
    linear = getattr(layer, "cpu_linear", None)
    handler = inspect.getclosurevars(linear).nonlocals.get("handler") if inspect.isfunction(linear) else None
    return getattr(handler, "handler_tensor", None)
