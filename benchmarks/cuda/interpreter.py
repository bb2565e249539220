"""Triton's interpreter for `--check` and for the tests, where no GPU is: set up before anything imports Triton.

Triton 3.9's interpreter multiplies the bits of bf16 matrices as integers (triton/runtime/interpreter.py, create_dot); here they are
widened first. It rounds fp32 to bf16 towards 0, a GPU to the nearest, so bf16 bits are compared on GPUs only.
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
