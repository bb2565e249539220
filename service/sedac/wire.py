"""The contract's messages from and to plain Python; the only place that knows both forms.

Used by the control service, the agent and the client.
"""

from __future__ import annotations

import datetime

from google.rpc import error_details_pb2, status_pb2

from sedac import errors
from sedac.control.v1 import control_pb2
from sedac.errors import FieldViolation, PolicyInvalid, SedacError
from sedac.policy import Checkpoint, Phase, Policy, Scope
from sedac.stats import Stats

AUTHOR_METADATA = "sedac-author"
"""request metadata: who asks for a change, in percent-encoded UTF-8"""
_DOMAIN = "sedac"
_MAX_VIOLATIONS, _MAX_FIELD_CHARS, _MAX_DESCRIPTION_CHARS, _MAX_MESSAGE_CHARS = 8, 64, 256, 1000  # gRPC refuses trailers from 8 KiB on
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
    """Write an error under a google.rpc code: ErrorInfo always, BadRequest for the fields of a refused policy; both cut to fit a trailer."""
    status = status_pb2.Status(code=code, message=_cut(str(error), _MAX_MESSAGE_CHARS))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=_DOMAIN))
    if isinstance(error, PolicyInvalid):
        bad = error_details_pb2.BadRequest()
        for violation in error.violations[:_MAX_VIOLATIONS]:
            bad.field_violations.add(field=_cut(violation.field, _MAX_FIELD_CHARS), description=_cut(violation.description, _MAX_DESCRIPTION_CHARS))
        status.details.add().Pack(bad)
    return status


def error_from_status(status: status_pb2.Status) -> SedacError | None:
    """Read the error that `error_to_status` wrote; None where it is none of sedac.errors."""
    reason, violations = "", []
    for detail in status.details:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info) and info.domain == _DOMAIN:
            reason = info.reason
        elif detail.Unpack(bad):
            violations = [FieldViolation(v.field, v.description) for v in bad.field_violations]
    if violations:
        return PolicyInvalid(violations)
    kind = getattr(errors, reason, None)
    return kind(status.message) if isinstance(kind, type) and issubclass(kind, SedacError) and kind is not PolicyInvalid else None


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
