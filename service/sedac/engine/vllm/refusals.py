"""What SEDAC can't be attached to is refused by name while the model is built, and graphs that can't branch are left before one is captured.

Called by engine/attach/attach.py, in every worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import get_tp_group

from sedac.engine.vllm.graphs import WITHOUT_GRAPHS
from sedac.errors import UnsupportedModel

if TYPE_CHECKING:
    from sedac.engine.vllm.config import StaticConfig

_log = logging.getLogger(__name__)
_MIN_CUDA = (12, 4)


def refuse_layout(vllm_config: VllmConfig) -> None:
    """Refuse ways to divide or to run the model in which SEDAC has no place.

    Raises:
        UnsupportedModel: pipeline parallelism, micro-batches, or Model Runner V2.
    """
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise UnsupportedModel(
            f"pipeline_parallel_size is {parallel.pipeline_parallel_size}; SEDAC decides across all layers and supports 1: use tensor parallelism"
        )
    if parallel.num_ubatches > 1:
        raise UnsupportedModel(f"{parallel.num_ubatches} micro-batches per step; SEDAC supports 1: turn dual batch overlap off")
    if vllm_config.use_v2_model_runner:
        # It replays full graphs without calling the model (v1/worker/gpu/model_runner.py, 0.32), where SEDAC begins and ends a step.
        raise UnsupportedModel("Model Runner V2 is not supported yet: set VLLM_USE_V2_MODEL_RUNNER=0")


def _has_graphs(vllm_config: VllmConfig, cuda: str | None) -> bool:
    return cuda is not None and vllm_config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)


def refuse_graphs(static: StaticConfig, vllm_config: VllmConfig, cuda: str | None = torch.version.cuda) -> None:
    """Refuse what can't run inside CUDA graphs: whatever the host must see or change within a pass.

    Raises:
        UnsupportedModel: recording, a draft or expert parallelism beside graphs, or a torch for a CUDA without conditional nodes.
    """
    if cuda is None or not _has_graphs(vllm_config, cuda):
        return
    mode, parallel = vllm_config.compilation_config.cudagraph_mode, vllm_config.parallel_config
    reason = ""
    if static.record:
        reason = "recording copies every pass's streams to the host"
    elif static.draft:
        reason = "self-speculation sets levels from the host within a pass"
    elif parallel.enable_expert_parallel and parallel.world_size_across_dp > 1:
        reason = "expert parallelism exchanges tokens inside the MLPs, which conditional nodes may leave out"
    elif tuple(int(part) for part in cuda.split(".")[:2]) < _MIN_CUDA:
        reason = f"this torch is built for CUDA {cuda}, conditional nodes need {_MIN_CUDA[0]}.{_MIN_CUDA[1]}"
    if reason:
        raise UnsupportedModel(f"cudagraph_mode is {mode.name}, but {reason}: set {WITHOUT_GRAPHS}")


def leave_graphs(vllm_config: VllmConfig, check: Callable[[], str], cuda: str | None = torch.version.cuda) -> None:
    """Let vLLM run without CUDA graphs where a smoke test shows that conditional nodes don't work here; one warning says so.

    All ranks of a tensor-parallel group do the same, since graphs hold their collectives.

    Args:
        check: the smoke test; returns why they don't work, empty: they do.
    """
    if not _has_graphs(vllm_config, cuda):
        return
    reason = _agree(check())
    if not reason:
        return
    _log.warning("SEDAC: conditional nodes do not work here (%s): running without CUDA graphs, slower", reason)
    # Early enough in vLLM 0.32, whose worker and runner share this config: while the model is built, nobody has acted on the mode yet. It is
    # read next when the built model is wrapped (load_model, v1/worker/gpu_model_runner.py), when memory is profiled (v1/worker/gpu_worker.py),
    # at the first forward, which compiles and wraps the pieces and hashes the config (compilation/backends.py, decorators.py), and when the
    # dispatcher gets its keys (_check_and_update_cudagraph_mode, v1/cudagraph_dispatcher.py). The list of sizes that the runner made before
    # (cudagraph_batch_sizes) has no reader. No sizes is what vLLM itself sets beside NONE (_set_cudagraph_sizes, config/vllm.py).
    compilation = vllm_config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.NONE
    compilation.max_cudagraph_capture_size, compilation.cudagraph_capture_sizes = 0, []


def _agree(reason: str) -> str:
    """Return the first reason of any rank of the tensor-parallel group; empty: none has one."""
    group = get_tp_group()
    if group.world_size == 1:
        return reason
    reasons: list[str | None] = [None] * group.world_size
    torch.distributed.all_gather_object(reasons, reason, group=group.cpu_group)
    return next(filter(None, reasons), "")
