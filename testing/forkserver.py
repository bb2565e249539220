"""What the fork server of testing/forked.py has imported before it forks: the slow part of every process that starts an engine."""

from __future__ import annotations

import gc
import os

# A pool of OpenMP threads does not survive a fork, so none may start here; the children get their own number of threads (forked.py).
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import sedac.app.cli
import sedac.engine.attach.models
import sedac.engine.step.worker
import sedac.engine.vllm.plugin  # noqa: F401
import sedac_probes.cli  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401
import vllm.distributed.elastic_ep.elastic_execute
import vllm.entrypoints.launchers.cli_args
import vllm.entrypoints.llm
import vllm.model_executor.layers.quantization.online.base
import vllm.utils.cpu_triton_utils
import vllm.v1.core.kv_cache_coordinator
import vllm.v1.executor.multiproc_executor
import vllm.v1.pool.flash_maxsim
import vllm.v1.worker.cpu_model_runner
import vllm.v1.worker.cpu_worker  # noqa: F401

gc.collect()
gc.freeze()  # children would copy every page that the collector touches
