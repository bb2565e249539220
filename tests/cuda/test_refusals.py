"""What CUDA graphs can't hold is refused by name, the rest is served; and the CPU's engine never loads the CUDA room."""

from __future__ import annotations

import concurrent.futures
import json
from types import SimpleNamespace

import pytest
from sedac.engine.vllm.config import StaticConfig
from sedac.engine.vllm.refusals import leave_graphs, refuse_graphs
from sedac.errors import ConfigError, UnsupportedModel
from vllm.config.compilation import CUDAGraphMode

from testing.forked import run_python
from tests.cuda.environment import REPOSITORY, make_environment


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
            refuse_graphs(static, make_config(mode), cuda)
    refuse_graphs(static, make_config(CUDAGraphMode.NONE), cuda)
    refuse_graphs(static, make_config(CUDAGraphMode.FULL), None)


def test_exchanges_inside_mlps_are_refused():
    with pytest.raises(UnsupportedModel, match=r"expert parallelism.*NONE"):
        refuse_graphs(StaticConfig(probe_set="p"), make_config(CUDAGraphMode.FULL, num_experts_ranks=2), "13.0")


def test_decisions_and_reductions_inside_graphs_are_served():
    for mode in CUDAGraphMode:
        assert refuse_graphs(StaticConfig(probe_set="p"), make_config(mode), "12.4") is None, mode


def test_graphs_stay_where_there_are_none_to_leave():
    """On a CPU, and without graphs, nobody asks the smoke test of IF nodes."""
    for mode, cuda in ((CUDAGraphMode.FULL, None), (CUDAGraphMode.NONE, "13.0"), (None, "13.0")):
        config = make_config(mode)
        leave_graphs(config, lambda: pytest.fail("IF nodes were asked"), cuda)
        assert config.compilation_config.cudagraph_mode is mode


def test_ranks_leave_graphs_together(tmp_path):
    code = f"""if True:
        import json, sys
        from types import SimpleNamespace
        import torch
        from sedac.engine.vllm import refusals
        from vllm.config.compilation import CUDAGraphMode
        rank = int(sys.argv[1])
        torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
        refusals.get_tp_group = lambda: SimpleNamespace(world_size=2, cpu_group=torch.distributed.group.WORLD)
        modes = []
        for reasons in (("", ""), ("", "no branch"), ("no branch", "")):
            config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL))
            refusals.leave_graphs(config, lambda: reasons[rank], "13.0")
            modes.append(config.compilation_config.cudagraph_mode.name)
        print(json.dumps(modes))
    """
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(run_python, "-c", code, str(rank), cwd=REPOSITORY, env=make_environment(), timeout=300) for rank in range(2)]
    for rank in ranks:
        assert json.loads(rank.result().stdout.splitlines()[-1]) == ["FULL", "NONE", "NONE"], rank.result().stderr


@pytest.mark.parametrize("value", [-1, 65537, 1.5, True, "16"])
def test_sizes_outside_the_limits_are_refused_with_value_limit_and_remedy(value):
    config = SimpleNamespace(additional_config={"sedac": {"probe_set": "p", "min_weight_mib": value}})
    with pytest.raises(ConfigError, match=rf"min_weight_mib: {value!r} is not .* 65536; .*leave it out for 16"):
        StaticConfig.from_vllm(config)


@pytest.mark.parametrize("value", [0, 1, 65536])
def test_sizes_within_the_limits_are_kept(value):
    config = SimpleNamespace(additional_config={"sedac": {"probe_set": "p", "min_weight_mib": value}})
    assert StaticConfig.from_vllm(config).min_weight_mib == value


def test_the_cpu_loads_nothing_of_the_cuda_room():
    room = "sedac.engine.backends.cuda"
    code = f"import sys, sedac.engine.step.worker, sedac.engine.attach.models; print([m for m in sys.modules if m.startswith({room!r})])"
    environment = make_environment()
    environment.pop("TRITON_INTERPRET", None)
    done = run_python("-c", code, cwd=REPOSITORY, env=environment, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr[-2000:]
