"""Generate the Python code of the contract: `python proto/generate.py [OUT]` (`make proto`).

The result is committed beside its users in service/sedac/control/v1; a test regenerates it and compares.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
WELL_KNOWN = Path(protoc.__file__).parent / "_proto"
GOOGLE_RPC = sysconfig.get_path("purelib")  # googleapis-common-protos installs google/rpc/*.proto there


def generate(out: Path) -> None:
    """Write *_pb2.py, *_pb2.pyi and *_pb2_grpc.py under `out`.

    Raises:
        RuntimeError: protoc failed; its messages are on stderr.
    """
    sources = [str(p.relative_to(HERE)) for p in sorted(HERE.rglob("*.proto"))]
    includes = [f"-I{HERE}", f"-I{WELL_KNOWN}", f"-I{GOOGLE_RPC}"]
    status = protoc.main(["protoc", *includes, f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}", *sources])
    if status:
        raise RuntimeError(f"protoc failed with status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "service")
