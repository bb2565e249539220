"""The two halves of a start, each in a process of its own on the forced platform (see forced_platform.py); tests/cuda/test_start.py runs them.

`python -m tests.cuda.start_job sedac RESULT.json ARGUMENTS...` runs the `sedac` command as its entry point does, up to where it would start
processes. `... engine RESULT.json ARGUMENTS...` takes vLLM's own arguments through its parser and its configuration, and builds the model.
`... modes RESULT.json LINES` (JSON) tells what SEDAC reads off flags and what vLLM makes of them, `... platform RESULT.json` the same of the
machine.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def run_sedac(arguments: list[str]) -> dict[str, Any]:
    """Run `sedac` with these arguments; returns the engine's command and environment, the log, or the error."""
    import logging

    from sedac.app import cli, launch
    from sedac.errors import SedacError

    found: dict[str, Any] = {"log": [], "error": ""}

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found["log"].append(record.getMessage())

    def keep(self: launch.Launch) -> int:
        found.update(command=self.engine_command, env=self.engine_env)
        return 0

    logging.getLogger("sedac").addHandler(Handler())
    launch.Launch.run = keep  # type: ignore[method-assign]
    try:
        cli.app(arguments, standalone_mode=False)
    except SedacError as error:
        found["error"] = str(error)
    found["heavy"] = [name for name in ("torch", "vllm") if name in sys.modules]
    return found


def _make_config(arguments: list[str]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    validate_parsed_serve_args(parsed)
    return AsyncEngineArgs.from_cli_args(parsed).create_engine_config()


def run_engine(arguments: list[str], *, reason: str = "") -> dict[str, Any]:
    """Configure vLLM and build the model on the CPU, with the GPU's forms attached; `reason`: what the smoke test of IF nodes shall say."""
    from sedac.engine.backends.cuda import if_nodes

    config = _make_config(arguments)
    compilation, speculative = config.compilation_config, config.speculative_config
    found: dict[str, Any] = {
        "device": str(config.device_config.device), "mode": compilation.cudagraph_mode.name, "worker": config.parallel_config.worker_cls,
        "v2": config.use_v2_model_runner, "speculative": speculative and speculative.model, "entry": config.additional_config.get("sedac"),
        "sizes": compilation.cudagraph_capture_sizes, "model": config.model_config.model,
    }  # fmt: skip
    if_nodes.check = lambda: reason  # no GPU, no smoke test
    try:
        model = _build(config)
    except Exception as error:  # noqa: BLE001  whatever refuses is the result
        return {**found, "refused": f"{type(error).__name__}: {error}"}
    state = model.sedac_state
    found.update(
        refused="", built=type(model).__name__, mode_built=compilation.cudagraph_mode.name, sizes_built=compilation.cudagraph_capture_sizes,
        forms=type(state.backend).__name__, mlps=sorted({type(layer.mlp).__name__ for layer in model.model.layers}),
        attention=type(model.model.layers[0].self_attn.attn.impl).__name__, draft=state.layout.draft,
        min_weight_bytes=state.backend.min_weight_bytes,
    )  # fmt: skip
    return {**found, "dispatched": _dispatch(config)}


def _build(config: Any) -> Any:
    """Build the model as a worker does before it loads weights, on the CPU, its state with the kernels that a GPU takes, interpreted."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    _use_cuda_backend()
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
        with set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
            return initialize_model(vllm_config=config)


def _use_cuda_backend() -> None:
    from benchmarks.cuda.interpreter import use_interpreter

    use_interpreter()
    from sedac.engine.backends import choice
    from sedac.engine.backends.cuda.backend import CudaBackend

    choice.choose_backend = lambda *_, min_weight_bytes: functools.partial(CudaBackend, min_weight_bytes=min_weight_bytes)


def _dispatch(config: Any) -> dict[str, Any]:
    """What vLLM's runner makes of the mode once the model is built: how a step of one token runs, and how a compiled piece is wrapped."""
    from vllm.compilation.backends import wrap_with_cudagraph_if_needed
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    compilation = config.compilation_config

    def piece() -> None: ...

    wrapped = wrap_with_cudagraph_if_needed(piece, config, compilation, is_first_graph=True, is_last_graph=False)
    dispatcher = CudagraphDispatcher(config)
    dispatcher.initialize_cudagraph_keys(compilation.resolve_cudagraph_mode_and_sizes(AttentionCGSupport.ALWAYS, "any"), 1)
    mode, _ = dispatcher.dispatch(1, uniform_decode=True)
    return {"step": mode.name, "is_wrapped": wrapped is not piece, "num_captures": sum(len(keys) for keys in dispatcher.cudagraph_keys.values())}


def compare_modes(lines: list[list[str]]) -> list[dict[str, Any]]:
    """For each line of flags, the mode of graphs that SEDAC reads off it and the one that vLLM's configuration has."""
    from sedac.engine.vllm.graphs import find_graph_mode

    found = []
    for line in lines:
        said = find_graph_mode(line)
        config = _make_config(["--model", str(REPOSITORY / "probes/sedac_demo/model"), *line])
        found.append({"line": line, "said": said, "made": config.compilation_config.cudagraph_mode.name})
    return found


def ask_platform() -> dict[str, Any]:
    """Whether SEDAC and vLLM think that this is CUDA."""
    from sedac.engine.vllm.graphs import is_cuda
    from vllm.platforms import resolve_current_platform_cls_qualname

    return {"ours": is_cuda(), "vllm": resolve_current_platform_cls_qualname() == "vllm.platforms.cuda.CudaPlatform"}


if __name__ == "__main__":
    part, out, *rest = sys.argv[1:]
    result: Any
    if part == "sedac":
        result = run_sedac(rest)
    elif part == "engine":
        result = run_engine(rest, reason=os.environ.get("SEDAC_TEST_IF_NODES", ""))
    elif part == "modes":
        result = compare_modes(json.loads(rest[0]))
    else:
        result = ask_platform()
    Path(out).write_text(json.dumps(result))
