"""Triton's interpreter for `--check` and for the tests, where no GPU is: set up before anything imports Triton.

Two faults of triton/runtime/interpreter.py are mended, whatever the version (seen in 3.6 and 3.9): `create_dot` multiplies the bits of
bf16 matrices as integers, here they are widened first; and a scalar becomes a Python number through `int(array)`, which numpy 2.5 refuses
for the interpreter's arrays of one element (3.6; 3.9 squeezes them). It rounds fp32 to bf16 towards 0, a GPU to the nearest, so bf16
bits are compared on GPUs only. And it is made fast enough for a test: each call of a device function prepares the whole language again,
which takes most of the time; here once per launch.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def use_interpreter() -> None:
    """Let kernels that are defined from now on run on CPU tensors."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton was imported before its interpreter was asked for; set TRITON_INTERPRET=1 first")
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widen(a), widen(b), *rest)

    if plain.__name__ == "create_dot" and not getattr(plain, "sedac", False):
        create_dot.sedac = True  # type: ignore[attr-defined]
        interpreter.InterpreterBuilder.create_dot = create_dot
        _mend_scalars(interpreter)
        _prepare_once(interpreter)


def _mend_scalars(interpreter: Any) -> None:
    """Let a scalar of the language become a Python number, under any numpy: as an index, and where a condition asks."""
    patch = interpreter._patch_lang_tensor

    def read(self: Any) -> Any:
        return self.handle.data.item()  # raises where it is not of one element

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(read(self)))
        scope.set_attr(tensor, "__bool__", lambda self: bool(read(self)) if self.handle.data.size == 1 else True)

    interpreter._patch_lang_tensor = patch_lang_tensor


def _prepare_once(interpreter: Any) -> None:
    """Prepare the modules that a function sees of the language once per launch, not at each call."""
    import triton.language as tl

    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    ready: set[tuple[int, ...]] = set()

    def patch_lang(fn: Any) -> Any:
        seen = tuple(sorted({id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}))
        if seen in ready:
            return None
        ready.add(seen)
        return prepare(fn)

    def run(self: Any, *arguments: Any, **keywords: Any) -> Any:
        ready.clear()  # what a launch has prepared it takes back at its end
        return launch(self, *arguments, **keywords)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, run
