"""Install the pinned CPU environment into the Python that runs this file: `python constraints/install.py [--torch-index URL] [FILE ...]`.

`make setup` calls it with every file of this folder, the Dockerfile with cpu.txt alone; both in a fresh virtual environment. It fetches
torch first, as a CPU build, from the package index that pip is configured with or else from PyTorch's own CPU index, because the torch on
PyPI is a CUDA build of several GB. The files follow without dependency resolution: they are complete, and resolving would bring
torchvision and its kin (see cpu.txt). It never installs SEDAC itself, and never touches an environment that is not its own.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TRAPS = ("torchvision", "torchaudio", "torchcodec")


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def pip(*args: str) -> bool:
    """Run pip install in this environment; its own progress bar and messages go to the terminal."""
    wheels = [f"--find-links={HERE / 'wheels'}"] if (HERE / "wheels").is_dir() else []
    return subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", *wheels, *args], check=False).returncode == 0


def installed(name: str) -> str:
    """The version of `name` in this environment, empty if it is absent; nothing is imported."""
    importlib.invalidate_caches()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def install_torch(version: str, index: str | None) -> None:
    """Install torch's CPU build from `index`, or from pip's own configuration and then from PyTorch's CPU index.

    Raises:
        SystemExit: no source has it; the message names the remedy.
    """
    if installed("torch") == f"{version}+cpu":
        say(f"torch {version}+cpu is there")
        return
    wanted = f"torch=={version}+cpu"
    for source in [index] if index else [None, PYTORCH_CPU_INDEX]:
        say(f"{wanted} from {source or 'the package index that pip is configured with'}")
        if pip(*(["--index-url", source] if source else []), wanted):
            return
        say("not to be had there")
    raise SystemExit(
        f"setup: no CPU build of torch {version} found for Python {sys.version_info.major}.{sys.version_info.minor}. "
        f"Name an index that has it: make setup TORCH_INDEX={PYTORCH_CPU_INDEX}, or put its wheel into {HERE / 'wheels'}."
    )


def name_missing_system_parts() -> None:
    """Say what serving will miss on this machine that pip cannot bring."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        say("missing: libnuma.so.1, without which vLLM's kernels do not load; install it (Debian: apt-get install libnuma1)")
    if not any(shutil.which(compiler) for compiler in ("g++", "c++", "clang++")):
        say("missing: a C++ compiler, which torch.compile calls when the engine starts; install it (Debian: apt-get install g++)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--torch-index", default="", metavar="URL", help="package index to take torch from, and no other")
    parser.add_argument("--check-system", action="store_true", help="also say what this machine lacks for serving")
    parser.add_argument("files", nargs="*", type=Path, default=[HERE / "cpu.txt", HERE / "tools.txt"], metavar="FILE")
    args = parser.parse_args()
    if sys.prefix == sys.base_prefix:
        raise SystemExit(f"setup: {sys.executable} is not in a virtual environment; create one (make setup does) and use its Python")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", "\n".join(file.read_text() for file in args.files), re.MULTILINE))

    if "torch" in pins:
        install_torch(pins["torch"], args.torch_index)
    say(f"{len(pins)} packages from {' and '.join(file.name for file in args.files)}")
    if not pip(*(f"--requirement={file}" for file in args.files)):
        raise SystemExit("setup: pip failed, its message is above; once the cause is gone, run the same command again: it goes on from here")
    if present := [name for name in TRAPS if installed(name)]:
        names = " ".join(present)
        raise SystemExit(f"setup: {names} beside a CPU torch breaks transformers; remove it: {sys.executable} -m pip uninstall {names}")
    check = "import torch; assert torch.version.cuda is None, f'{torch.__version__} is a CUDA build'; print('setup: torch', torch.__version__)"
    if "torch" in pins and subprocess.run([sys.executable, "-c", check], check=False).returncode:
        raise SystemExit("setup: torch is not a CPU build that imports; its message is above. Remove .venv and run make setup again")
    if args.check_system:
        name_missing_system_parts()


if __name__ == "__main__":
    main()
