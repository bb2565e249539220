"""The process that rows run in, so that what goes wrong in one costs the others nothing: runner.py starts it, and again after a crash.

Reads one JSON object a line from its standard input, {"spec": ..., "context": ...}, and answers each by one line on the file descriptor
that its first argument names: the row's fields, or {"failed": text}. What is printed here is the log.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

PARTS = {
    "card": "ceilings", "nodes": "nodes", "captured": "captured", "captured checkpoints": "captured_checkpoints", "kernels": "measured",
    "probe": "checkpoints", "step": "stepped", "swaps": "swaps",
}  # fmt: skip
"""the module whose `run_row(spec, context)` makes a part's rows"""


def main() -> None:
    """Answer until the input ends, or the device answers no more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan holds the card
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "service"))
    answers = os.fdopen(int(sys.argv[1]), "w")
    if "--interpreted" in sys.argv:
        from interpreter import use_interpreter

        use_interpreter()
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        _answer(answers, {"ready": True})
        for line in sys.stdin:
            asked = json.loads(line)
            row = run(asked["spec"], asked["context"])
            is_lost = "failed" in row and not _is_well()
            _answer(answers, row | ({"failed": f"{row['failed']} (and the device answers no more)"} if is_lost else {}))
            if is_lost:
                os._exit(70)  # an error of the device stays with the process; torch's own end may hang on it


def run(spec: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of one row, `failed` among them if something was raised."""
    try:
        found: dict[str, Any] = importlib.import_module(PARTS[spec["part"]]).run_row(spec, context)
    except Exception as error:  # noqa: BLE001  # told in the row; the next one may be well
        traceback.print_exc()
        sys.stderr.flush()
        return {"failed": f"{type(error).__name__}: {error}"}
    return found


def _is_well() -> bool:
    """Whether the device still answers."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return float(torch.ones(1, device="cuda")) == 1.0
    except RuntimeError:
        return False
    return True


def _answer(answers: Any, row: dict[str, Any]) -> None:
    answers.write(json.dumps(row) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
