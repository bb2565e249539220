"""What the fork server of tests/forked.py has imported before it forks: the slow part of every process that starts an engine."""

from __future__ import annotations

import gc
import os

# A pool of OpenMP threads does not survive a fork, so none may start here; the children get their own number of threads (forked.py).
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import sedac.engine.step.worker  # noqa: F401
import sedac_probes.cli  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401
import vllm.entrypoints.llm
import vllm.v1.worker.cpu_model_runner
import vllm.v1.worker.cpu_worker  # noqa: F401

gc.collect()
gc.freeze()  # children would copy every page that the collector touches
