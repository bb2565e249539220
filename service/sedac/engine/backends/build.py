"""Build the native kernels for the CPU: `python -m sedac.engine.backends.build`, called by `make setup` and by the image.

Compiles kernels/*.cpp against the torch of this environment into one library beside this file. It holds a form for every
x86-64 level and picks when it is loaded, so a library built on one machine runs on another. Without it the engine runs the
same rules in plain torch, slower.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "_kernels.so"


def make_command(output: Path) -> list[str]:
    """Return the compiler's command line (the compiler from CXX, else g++)."""
    import torch

    root = Path(torch.__file__).parent
    sources = sorted(str(path) for path in (HERE / "kernels").glob("*.cpp"))
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}"]
    flags = ["-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", abi]
    return [os.environ.get("CXX", "g++"), *flags, *includes, *sources, "-o", str(output), *libraries, "-lc10", "-ltorch_cpu", "-ltorch"]


def main() -> None:
    """Compile; leaves an up-to-date library alone.

    Raises:
        SystemExit: the compiler is missing or fails; carries its output.
    """
    newest = max(path.stat().st_mtime for path in (HERE / "kernels").iterdir())
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > newest and "--force" not in sys.argv:
        print(f"kernels: {LIBRARY.name} is up to date")
        return
    partial = LIBRARY.with_suffix(".partial")
    print(f"kernels: compiling for {sysconfig.get_platform()}")
    try:
        done = subprocess.run(make_command(partial), capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise SystemExit(f"kernels: no C++ compiler ({error.filename}); install g++ or name one in CXX") from error
    if done.returncode:
        raise SystemExit(f"kernels: {done.stderr[-4000:]}\nkernels: the compiler failed; the engine will run its slower torch forms")
    partial.rename(LIBRARY)
    print(f"kernels: built {LIBRARY}")


if __name__ == "__main__":
    main()
