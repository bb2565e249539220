"""These tests run under Triton's interpreter, in the process that tests/cuda/test_interpreted.py starts for them."""

from __future__ import annotations

import os

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if IS_INTERPRETED else ["test_*.py"]

if IS_INTERPRETED:
    from benchmarks.cuda.interpreter import use_interpreter

    use_interpreter()
