"""Generate the Python code of the contract: `python proto/generate.py [OUT]` (`make proto`).

The result is committed in service/sedac/contract/v1; a test regenerates it and compares. The package on the wire is
`sedac.control.v1`, whatever the place of its Python code.
"""

from __future__ import annotations

import re
import sys
import sysconfig
import tempfile
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
WELL_KNOWN = Path(protoc.__file__).parent / "_proto"
GOOGLE_RPC = sysconfig.get_path("purelib")  # googleapis-common-protos installs google/rpc/*.proto there


PACKAGE, PLACE = "sedac.control.v1", "sedac.contract.v1"


def generate(out: Path) -> None:
    """Write *_pb2.py, *_pb2.pyi and *_pb2_grpc.py under `out`/sedac/contract/v1.

    Raises:
        RuntimeError: protoc failed; its messages are on stderr.
    """
    sources = [str(p.relative_to(HERE)) for p in sorted(HERE.rglob("*.proto"))]
    includes = [f"-I{HERE}", f"-I{WELL_KNOWN}", f"-I{GOOGLE_RPC}"]
    with tempfile.TemporaryDirectory() as made:
        status = protoc.main(["protoc", *includes, f"--python_out={made}", f"--pyi_out={made}", f"--grpc_python_out={made}", *sources])
        if status:
            raise RuntimeError(f"protoc failed with status {status}")
        place = out / PLACE.replace(".", "/")
        place.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(made, PACKAGE.replace(".", "/")).iterdir()):
            text = re.sub(rf"^(from|import) {re.escape(PACKAGE)}\b", rf"\1 {PLACE}", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            (place / path.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "service")
