"""The Triton kernels know the kinds of levels by the numbers of the registry."""

from __future__ import annotations

import torch
from sedac.engine.backends import choice, kinds
from sedac.engine.backends.cuda import few, flags
from sedac.engine.backends.cuda.backend import CudaBackend
from sedac.policy.model import MAX_LEVELS


def test_constants_are_the_registrys():
    numbers = {kind.name: number for number, kind in enumerate(kinds.KINDS) if kind.name in CudaBackend.kinds}
    assert {name: getattr(few, f"KIND_{name.upper()}").value for name in CudaBackend.kinds} == numbers
    assert (flags.KIND_FULL.value, flags.KIND_SKIP.value, flags.KIND_WIDTH.value) == (numbers["full"], numbers["skip"], numbers["width"])
    assert few.NUM_LEVELS.value == flags.NUM_LEVELS.value == MAX_LEVELS


def test_a_gpu_gets_this_backend_with_its_limit():
    made = choice.choose_backend(torch.device("cuda"), torch.float16, min_weight_bytes=5)
    assert (made.func, made.keywords) == (CudaBackend, {"min_weight_bytes": 5})
