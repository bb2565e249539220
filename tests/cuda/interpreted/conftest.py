"""These tests run under Triton's interpreter, in the process that tests/cuda/test_interpreted.py starts for them."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
