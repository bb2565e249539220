"""Parts of vLLM that SEDAC's step and backends are built from, under one roof: whoever moves to another vLLM looks here and in patches.py."""

from __future__ import annotations

import inspect
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sedac.engine.vllm.patches import named

with named():
    from vllm.config import VllmConfig
    from vllm.config.compilation import CompilationMode
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
    from vllm.distributed.parallel_state import get_tp_group
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.utils.torch_utils import direct_register_custom_op

__all__ = [
    "Attention",
    "RMSNorm",
    "UnquantizedLinearMethod",
    "VllmConfig",
    "WeightForm",
    "Weights",
    "direct_register_custom_op",
    "find_weights",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "is_compiled",
    "share",
    "tensor_model_parallel_all_reduce",
]


def share(value: Any) -> Any:
    """Return the value of the first rank of the tensor-parallel group, on all of them; anything that pickle takes."""
    group = get_tp_group()
    if group.world_size == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=group.ranks[0], group=group.cpu_group)
    return values[0]


def is_compiled(vllm_config: VllmConfig) -> bool:
    """Whether the model runs under torch.compile."""
    return bool(vllm_config.compilation_config.mode != CompilationMode.NONE)


class WeightForm(IntEnum):
    """How vLLM keeps the weights of a dense linear layer on a CPU; the numbers are those of kernels/products.h."""

    HANDLER = 0
    """A handler of oneDNN."""
    PACKED = 1
    """The tiles that machines with AMX multiply weights of up to 1 MiB from; a bias is fp32 then."""
    PLAIN = 2
    """As torch has it, (outputs, inputs)."""


class Weights(NamedTuple):
    """The weights of a linear layer where vLLM keeps them."""

    tensor: Tensor
    form: WeightForm


def find_weights(layer: Any) -> Weights | None:
    """Return the weights of a linear layer as vLLM multiplies with them on a CPU; None where it took a kernel that SEDAC does not know."""
    linear = getattr(layer, "cpu_linear", None)
    if not inspect.isfunction(linear):
        return None
    names = inspect.getclosurevars(linear)
    handler = getattr(names.nonlocals.get("handler"), "handler_tensor", None)
    if handler is not None:
        return Weights(handler, WeightForm.HANDLER)
    packed = names.nonlocals.get("packed_weight")
    if packed is not None and packed.dtype == torch.bfloat16:
        return Weights(packed, WeightForm.PACKED)
    if "linear" in names.unbound and not names.nonlocals:
        return Weights(layer.weight.data, WeightForm.PLAIN)
    return None
