"""docs/reference/errors.md: every class of sedac/errors.py, with what a gRPC caller and a shell see of it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
from typing import Any

import grpc
import typer
from sedac import errors
from sedac.control.base.status import answering
from sedac.ctl.session import exiting
from sedac.errors import FieldViolation, PolicyInvalid, SedacError

_HEAD = """# Errors

This page is generated from the code (`make docs`). Every error that SEDAC raises on purpose is a class of `sedac.errors`. Its message gives
the value at fault, the limit and the remedy.

Over gRPC an error is a status with two kinds of details: `google.rpc.ErrorInfo` always, whose `reason` is the class's name and whose
`domain` is `sedac`, and `google.rpc.BadRequest` with the fields at fault where a policy was refused. The clients of `sedac.client` turn
such a status back into the class. INTERNAL is what any error becomes that has no status of its own. `sedac ctl` ends with the exit code.

"""
_REMEDIES = {
    "SedacError": "This is the base class, for `except`; it is never raised itself.",
    "ConfigError": "Correct the variable or the flag that the message names.",
    "PolicyInvalid": "Correct each field that is listed. The policy in force has not changed.",
    "StaleEtag": "Read the policy again, look at what has changed, and send your change with the new etag.",
    "RevisionNotFound": "`sedac ctl policy revisions` lists the revisions that exist.",
    "RevisionCompacted": "Use a newer revision; `SEDAC_CONTROL_KEEP_REVISIONS` says how many are kept.",
    "RequestIdReused": "Send every new request under a request id of its own; only a retry repeats one.",
    "StoreFailed": "Free space on the disk of the database or mend it, then retry. Nothing was stored.",
    "EngineReplaced": "Give every engine an id of its own (`SEDAC_ENGINE_ID`); after a restart nothing need be done.",
    "ProbeSetNotFound": "`sedac ctl probe-set list` lists what was uploaded; upload the missing one.",
    "ProbeSetExists": "Upload the changed probe set under a new name. A name belongs to its content for ever.",
    "ProbeSetInUse": "Put a policy into force that names another probe set, wait for the engines, then delete.",
    "RolloutNotFound": "`sedac ctl rollout list` lists the roll-outs.",
    "RolloutConflict": "`sedac ctl rollout show` says which state the roll-out is in; abort or promote it first.",
    "LimitExceeded": "Send less or more slowly, or raise the limit that the message names.",
    "Unauthenticated": "Name a token file (`SEDAC_CONTROL_TOKEN_FILE`) or a client certificate.",
    "PermissionDenied": "Ask an administrator for the role that the message names.",
    "ArtifactError": "Make the probe set or the draft again for this model with `sedac-probes`, or name the right directory.",
    "UnsupportedModel": "Serve the model without SEDAC, or with the layout that the message asks for.",
    "ControlUnavailable": "See whether the control service runs and whether the address is right. Engines serve on meanwhile.",
    "NotSynced": "`sedac ctl engine list` says which engine is behind or has refused, and why.",
    "BenchmarkFailed": "Read the log that the message names, mend what it says, and run the same command again; what was measured is kept.",
}


def render() -> dict[str, str]:
    """Return the page.

    Raises:
        ValueError: an error has no remedy here, or a remedy belongs to no error.
    """
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, SedacError)]
    names = {kind.__name__ for kind in kinds}
    if odd := sorted(names ^ _REMEDIES.keys()):
        raise ValueError(f"docs/generate/errors.py and sedac/errors.py differ in {', '.join(odd)}; write or remove the remedy")
    rows = ["| error | meaning | gRPC status | exit code | what to do |", "|---|---|---|---|---|"]
    for kind in sorted(kinds, key=lambda kind: list(vars(errors)).index(kind.__name__)):
        meaning = inspect.getdoc(kind) or ""
        rows.append(
            f"| `{kind.__name__}` | {' '.join(meaning.split())} | {_find_status(kind)} | {_find_exit_code(kind)} | {_REMEDIES[kind.__name__]} |"
        )
    return {"errors.md": _HEAD + "\n".join(rows) + "\n"}


def _make(kind: type[SedacError]) -> SedacError:
    return PolicyInvalid([FieldViolation("decay", "2 is outside 0..1")]) if kind is PolicyInvalid else kind("an example")


class _Context:
    """Takes what a servicer answers."""

    status: Any = None

    async def abort_with_status(self, status: Any) -> None:
        self.status = status


def _find_status(kind: type[SedacError]) -> str:
    async def answer() -> grpc.StatusCode:
        context = _Context()
        async with answering(context):
            raise _make(kind)
        return context.status.code

    return asyncio.run(answer()).name


def _find_exit_code(kind: type[SedacError]) -> int:
    try:
        with contextlib.redirect_stderr(io.StringIO()), exiting():
            raise _make(kind)
    except typer.Exit as end:
        return end.exit_code
    raise AssertionError(f"{kind.__name__} did not end the command")
