"""The contract's messages from and to plain Python; the only place that knows both forms.

Used by the control service, the agent and the client.
"""

from __future__ import annotations

import datetime

from google.rpc import error_details_pb2, status_pb2

from sedac.control.v1 import control_pb2
from sedac.errors import FieldViolation, PolicyInvalid
from sedac.policy import Checkpoint, Phase, Policy, Scope
from sedac.stats import Stats

_PHASES: dict[int, Phase] = {control_pb2.PHASE_UNSPECIFIED: "decode", control_pb2.PHASE_DECODE: "decode", control_pb2.PHASE_ALL: "all"}
_SCOPES: dict[int, Scope] = {control_pb2.SCOPE_UNSPECIFIED: "token", control_pb2.SCOPE_TOKEN: "token", control_pb2.SCOPE_BATCH: "batch"}
_PHASE_NUMBERS = {"decode": control_pb2.PHASE_DECODE, "all": control_pb2.PHASE_ALL}
_SCOPE_NUMBERS = {"token": control_pb2.SCOPE_TOKEN, "batch": control_pb2.SCOPE_BATCH}


def policy_from_proto(message: control_pb2.Policy) -> Policy:
    """Read the settable fields; values are not validated beyond the enums.

    Raises:
        PolicyInvalid: an enum holds a number that this version does not know.
    """
    bad = []
    if message.phase not in _PHASES:
        bad.append(FieldViolation("phase", f"{message.phase} is unknown; use PHASE_DECODE or PHASE_ALL"))
    if message.scope not in _SCOPES:
        bad.append(FieldViolation("scope", f"{message.scope} is unknown; use SCOPE_TOKEN or SCOPE_BATCH"))
    if bad:
        raise PolicyInvalid(bad)
    return Policy(
        enabled=message.enabled,
        probe_set=message.probe_set,
        checkpoints=tuple(Checkpoint(layer=c.layer, threshold=c.threshold) for c in message.checkpoints),
        phase=_PHASES[message.phase],
        scope=_SCOPES[message.scope],
    )


def policy_to_proto(
    policy: Policy,
    *,
    name: str = "",
    etag: str = "",
    revision: int = 0,
    create_time: datetime.datetime | None = None,
    author: str = "",
    comment: str = "",
) -> control_pb2.Policy:
    """Write a policy and what the store knows about its revision; `create_time` must carry a time zone."""
    message = control_pb2.Policy(
        name=name,
        etag=etag,
        revision=revision,
        author=author,
        comment=comment,
        enabled=policy.enabled,
        probe_set=policy.probe_set,
        checkpoints=[control_pb2.Checkpoint(layer=c.layer, threshold=c.threshold) for c in policy.checkpoints],
        phase=_PHASE_NUMBERS[policy.phase],
        scope=_SCOPE_NUMBERS[policy.scope],
    )
    if create_time is not None:
        message.revision_create_time.FromDatetime(create_time)
    return message


def stats_to_report(stats: Stats) -> control_pb2.EngineReport:
    """Write a worker's totals."""
    return control_pb2.EngineReport(
        active_revision=stats.active_revision,
        num_steps=stats.num_steps,
        num_torn_steps=stats.num_torn_steps,
        num_tokens=stats.num_tokens,
        num_decode_tokens=stats.num_decode_tokens,
        num_mlp_blocks_computed=stats.num_mlp_blocks_computed,
        num_mlp_blocks_skipped=stats.num_mlp_blocks_skipped,
        checkpoints=[control_pb2.CheckpointReport(**vars(c)) for c in stats.checkpoints],
    )


def error_to_status(error: Exception, code: int) -> status_pb2.Status:
    """Write an error under a google.rpc code: ErrorInfo always, BadRequest for the fields of a refused policy."""
    status = status_pb2.Status(code=code, message=str(error))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=type(error).__name__, domain="sedac"))
    if isinstance(error, PolicyInvalid):
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(field=violation.field, description=violation.description)
        status.details.add().Pack(bad)
    return status


def error_from_status(status: status_pb2.Status) -> PolicyInvalid | None:
    """Read the bad fields of a status; None where it names none."""
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            return PolicyInvalid([FieldViolation(v.field, v.description) for v in bad.field_violations])
    return None
