"""Build the native kernels for the CPU: `python -m sedac.engine.backends.build`, called by `make setup`, by the image and by `sedac serve`.

Compiles kernels/*.cpp against the torch of this environment into one library: beside this file, or in the user's cache where that folder
can't be written to. It holds a form for every x86-64 level and picks when it is loaded, so a library built on one machine runs on another.
Without it the engine runs the same rules in plain torch, slower.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "_kernels.so"

_log = logging.getLogger(__name__)


def find_cache() -> Path | None:
    """Return SEDAC's folder in the user's cache; None: no home, no cache."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sedac"
    except RuntimeError:
        return None


def hash_sources() -> str:
    """Return what names the kernels' sources and the torch that they are built for."""
    sources = sorted((HERE / "kernels").iterdir())
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch_version = ""
    made_of = [torch_version.encode(), *(path.read_bytes() for path in sources)]
    return hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]


def get_cached_library() -> Path | None:
    """Return the library's place in the user's cache, which names the sources and the torch that it is built from; None: no cache."""
    cache = find_cache()
    return None if cache is None else cache / "kernels" / f"{hash_sources()}.so"


def find_library() -> Path | None:
    """Return the built library, one made of these very sources where there is one; None: there is none."""
    if _is_current(LIBRARY):
        return LIBRARY
    cached = get_cached_library()
    if cached is not None and cached.exists():
        return cached
    return LIBRARY if LIBRARY.exists() else None


def _is_current(library: Path) -> bool:
    """Whether a library was built after the sources came: an installer leaves an earlier version's in its place."""
    return library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in (HERE / "kernels").iterdir())


def build_missing() -> None:
    """Build the library once where there is none of these sources; a warning tells where that can't be, and serving goes on without it."""
    if _is_current(LIBRARY) or ((cached := get_cached_library()) is not None and cached.exists()):
        return
    _log.info("building SEDAC's native kernels once, about a minute")
    done = subprocess.run([sys.executable, "-m", "sedac.engine.backends.build"], capture_output=True, text=True, check=False)
    if done.returncode:
        _log.warning(
            "SEDAC's native kernels could not be built, without them slower torch forms run: %s",
            done.stderr.strip() or f"exit code {done.returncode}",
        )


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
        SystemExit: the compiler is missing or fails, whose output it carries, or there is no folder to write to.
    """
    library = LIBRARY if os.access(HERE, os.W_OK) else get_cached_library()
    if library is None:
        raise SystemExit("kernels: neither the package's folder nor a user's cache can be written to; set XDG_CACHE_HOME to a folder that can")
    if _is_current(library) and "--force" not in sys.argv:
        print(f"kernels: {library.name} is up to date")
        return
    partial = library.with_suffix(f".{os.getpid()}.partial")
    print(f"kernels: compiling for {sysconfig.get_platform()}")
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(make_command(partial), capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise SystemExit(f"kernels: no C++ compiler ({error.filename}); install g++ or name one in CXX") from error
    except OSError as error:
        raise SystemExit(f"kernels: {error}") from error
    if done.returncode:
        raise SystemExit(f"kernels: {done.stderr[-4000:]}\nkernels: the compiler failed; the engine will run its slower torch forms")
    partial.rename(library)
    print(f"kernels: built {library}")


if __name__ == "__main__":
    main()
