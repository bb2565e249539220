"""What CUDA graphs can't hold is refused by name, the rest is served; and the CPU's engine never loads the CUDA room."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from sedac.engine.models import StaticConfig, _refuse_graphs
from sedac.errors import UnsupportedModel
from vllm.config.compilation import CUDAGraphMode

from tests.cuda.test_interpreted import REPOSITORY, make_environment


def make_config(mode: CUDAGraphMode, *, num_experts_ranks: int = 1) -> SimpleNamespace:
    parallel = SimpleNamespace(enable_expert_parallel=num_experts_ranks > 1, world_size_across_dp=num_experts_ranks)
    return SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode), parallel_config=parallel)


@pytest.mark.parametrize(
    ("static", "cuda", "said"),
    [
        (StaticConfig(record=True), "13.0", "recording"),
        (StaticConfig(draft="d"), "13.0", "self-speculation"),
        (StaticConfig(probe_set="p"), "12.3", "12.4"),
    ],
)
def test_what_graphs_cannot_hold_is_refused_with_the_remedy(static, cuda, said):
    for mode in (CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL_AND_PIECEWISE):
        with pytest.raises(UnsupportedModel, match=f"{said}.*NONE"):
            _refuse_graphs(static, make_config(mode), cuda)
    _refuse_graphs(static, make_config(CUDAGraphMode.NONE), cuda)
    _refuse_graphs(static, make_config(CUDAGraphMode.FULL), None)


def test_exchanges_inside_mlps_are_refused():
    with pytest.raises(UnsupportedModel, match=r"expert parallelism.*NONE"):
        _refuse_graphs(StaticConfig(probe_set="p"), make_config(CUDAGraphMode.FULL, num_experts_ranks=2), "13.0")


def test_decisions_and_reductions_inside_graphs_are_served():
    for mode in CUDAGraphMode:
        assert _refuse_graphs(StaticConfig(probe_set="p"), make_config(mode), "12.4") is None, mode


def test_the_cpu_loads_nothing_of_the_cuda_room():
    code = "import sys, sedac.engine.worker, sedac.engine.models; print([m for m in sys.modules if m.startswith('sedac.engine.cuda')])"
    environment = make_environment()
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr[-2000:]
