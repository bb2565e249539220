"""Compile the very launches that the engine makes, for sm_90, without a GPU: launches are caught and their kernels built.

Run as a program it prints one line of JSON per kernel: name, constants, bytes of the cubin, registers, bytes spilled. `--bf16` leaves
out fp16, `--one` leaves out all numbers of rows but one, all types but bf16, and all forms of the MLP but the one for few rows.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from sedac.engine.backends.cuda import forms
from sedac.engine.backends.cuda.backend import CudaBackend
from sedac.engine.backends.cuda.mlp import DeviceMlp, DeviceNeurons, Parts
from sedac.engine.backends.levels import LevelTable
from sedac.engine.backends.tokens import Tokens
from sedac.engine.step.state import State
from sedac.policy.layout import Layout
from sedac.probe.probe import LREProbe
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

CPU, META = torch.device("cpu"), torch.device("meta")
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}


def _compile(kernel: JITFunction, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    options = {k: keywords.pop(k) for k in ("num_warps", "num_stages") if k in keywords}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(i,)] = f"*{NAMES[value.dtype]}", [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin: bytes = built.asm["cubin"]
    chosen = {kernel.arg_names[i]: value for (i,), value in constants.items()}
    return {"kernel": kernel.__name__, "constants": chosen, "bytes": len(cubin), "shared": built.metadata.shared, **_measure(cubin)}


def _measure(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=False).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    return {"registers": int(found[1]), "stack": int(found[2])} if found else {}


def catch(run: Callable[[], object], seen: dict[str, dict[str, Any]]) -> None:
    """Call `run` and compile what it launches, each kernel with the same constants and types once."""

    def launch(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        types = [str(a.dtype) if isinstance(a, torch.Tensor) else "" for a in arguments]
        key = f"{self.__name__} {types} {sorted(keywords.items())}"
        if key not in seen:
            seen[key] = _compile(self, arguments, dict(keywords))

    with mock.patch.object(JITFunction, "run", launch):
        run()


def make_mlp(
    backend: CudaBackend, hidden_size: int, size: int, dtype: torch.dtype, form: int, *, has_neurons: bool = True, repaired: bool = False,
    has_own_activation: bool = False,
) -> DeviceMlp:  # fmt: skip
    """Make an MLP of weights without memory; its own products do nothing."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    neurons = DeviceNeurons(
        order_F=empty(size, dtype=torch.int32), rank_F=empty(size, dtype=torch.int32), natural_scale_F=empty(size, dtype=torch.float32),
        scale_F=empty(size, dtype=torch.float32), down_FD=empty(size, hidden_size), repaired=repaired, scores_activation=False,
    )  # fmt: skip
    parts = Parts(
        weights=(empty(2 * size, hidden_size), empty(hidden_size, size)), gate_up=lambda x: x.new_empty(x.shape[0], 2 * size),
        down=lambda h: h.new_empty(h.shape[0], hidden_size), activation=0,
        own_activation=(lambda x: x.new_empty(x.shape[0], size)) if has_own_activation else None,
    )  # fmt: skip
    return DeviceMlp(
        backend=backend, layer=0, kind_V=backend.table.kind_LV[0], parameter_V=backend.table.parameter_LV[0], falling_V=empty(16, dtype=torch.int32),
        base=torch.empty_like, parts=parts, neurons=neurons if has_neurons else None, form=form,
    )  # fmt: skip


def compile_all(
    hidden_size: int = 3584, size: int = 18944, rank: int = 128, num_layers: int = 28, *, only_bf16: bool = False, only_one: bool = False
) -> dict[str, dict[str, Any]]:
    """Compile every kernel as the engine launches it at a model's shapes, or a few of them (see above); by launch."""
    layout = Layout(num_layers=num_layers, hidden_size=hidden_size, checkpoint_layers=(4,), probe_set="t", levels=("full", "skip"), max_rank=rank)
    seen: dict[str, dict[str, Any]] = {}
    zeros = np.zeros(1, dtype=np.uint8)
    tokens = Tokens(role_T=zeros, floor_T=zeros + 1, goal_T=zeros, scale_T=np.ones(1, dtype=np.float32), tier_T=np.zeros(1, dtype=np.int64))

    made: list[State] = []

    def begin() -> None:
        table = LevelTable(num_layers, (), (), size, CPU)
        state = State(layout, {4: LREProbe(hidden_size, rank)}, table, max_num_tokens=512, device=CPU, make_backend=CudaBackend)
        made.append(state)
        state.begin_step(1, tokens)
        for num_rows in (16,) if only_one else (1, 8, 16, 256):
            for dtype in (torch.bfloat16,) if only_one else (torch.float32, torch.bfloat16):
                stream = torch.empty(num_rows, hidden_size, dtype=dtype, device=META)
                state.observe(4, stream, None if dtype == torch.float32 else stream)

        state.end_step()

    catch(begin, seen)
    backend = made[0].backend
    assert isinstance(backend, CudaBackend)
    for dtype in (torch.bfloat16,) if only_bf16 or only_one else (torch.bfloat16, torch.float16):
        for form, num_rows in ((forms.FEW, 1), (forms.MIDDLE, 64), (forms.MANY, 256))[: 1 if only_one else None]:
            for has_neurons in (True, False):
                if form == forms.FEW and not has_neurons:
                    continue
                mlp = make_mlp(backend, hidden_size, size, dtype, form, has_neurons=has_neurons, repaired=True)
                backend.repair_GL.fill_(True)
                x = torch.empty(num_rows, hidden_size, dtype=dtype, device=META)
                catch(functools.partial(mlp.compute, x), seen)
        if only_one:
            continue
        mlp = make_mlp(backend, hidden_size, size, dtype, forms.MIDDLE, has_own_activation=True)
        catch(functools.partial(mlp.compute, torch.empty(64, hidden_size, dtype=dtype, device=META)), seen)
    return seen


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    for line in compile_all(only_bf16="--bf16" in sys.argv, only_one="--one" in sys.argv).values():
        print(json.dumps(line))
