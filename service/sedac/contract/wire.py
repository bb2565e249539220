"""The contract's messages from and to plain Python; with mapping.py the only place that knows both forms.

Used by the control service, the agent and the client.
"""

from __future__ import annotations

import datetime

from google.rpc import error_details_pb2, status_pb2

from sedac import errors
from sedac.contract.mapping import read, write
from sedac.contract.stats import DraftingStats, Evidence, Stats
from sedac.contract.v1 import control_pb2, drafting_pb2, evidence_pb2
from sedac.errors import FieldViolation, PolicyInvalid, SedacError
from sedac.policy.certificate import Certificate
from sedac.policy.knob import find_problem, list_fields
from sedac.policy.layout import Layout
from sedac.policy.model import Candidate, Policy, Speculation

AUTHOR_METADATA = "sedac-author"
"""Key of the request metadata that says who asks for a change, in percent-encoded UTF-8."""
_DOMAIN = "sedac"
_MAX_VIOLATIONS, _MAX_FIELD_CHARS, _MAX_DESCRIPTION_CHARS, _MAX_MESSAGE_CHARS = 8, 64, 256, 1000  # gRPC refuses trailers from 8 KiB on


def policy_from_proto(message: control_pb2.Policy) -> Policy:
    """Read the settable fields; values are not validated beyond the enums.

    Raises:
        PolicyInvalid: an enum holds a number that this version does not know.
    """
    bad: list[FieldViolation] = []
    policy = read(Policy, message, bad)
    if bad:
        raise PolicyInvalid(bad)
    return policy


def certificate_from_proto(message: control_pb2.Certificate) -> Certificate:
    """Read a certificate; values are not validated."""
    return read(Certificate, message, [])


def speculation_from_proto(message: control_pb2.Speculation) -> Speculation:
    """Read the knobs of self-speculation; values are not validated."""
    return read(Speculation, message, [])


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
    message = write(policy, control_pb2.Policy(name=name, etag=etag, revision=revision, author=author, comment=comment))
    if create_time is not None:
        message.revision_create_time.FromDatetime(create_time)
    return message


def layout_from_hello(hello: control_pb2.EngineHello) -> Layout:
    """Read what an engine has attached."""
    return read(Layout, hello, [])


def stats_to_report(stats: Stats) -> control_pb2.EngineReport:
    """Write a worker's totals."""
    return write(stats, control_pb2.EngineReport())


def drafting_from_proto(message: drafting_pb2.Drafting) -> DraftingStats:
    """Read the totals of self-speculation and the controller's state; a state that this version does not know reads `unknown`."""
    return read(DraftingStats, message, [])


def evidence_to_proto(evidence: Evidence) -> evidence_pb2.Evidence:
    """Write what an engine measured of one tier on one side."""
    return write(evidence, evidence_pb2.Evidence())


def candidate_to_proto(candidate: Candidate) -> control_pb2.Candidate:
    """Write a roll-out's candidate as engines are pushed it."""
    return write(candidate, control_pb2.Candidate())


def candidate_from_proto(message: control_pb2.Candidate) -> Candidate:
    """Read a roll-out's candidate; its policy is not validated.

    Raises:
        PolicyInvalid: the number or the share can't be, or an enum of the policy holds a number that this version does not know.
    """
    bad: list[FieldViolation] = []
    candidate = read(Candidate, message, bad, "candidate.")
    problems = {field.name: find_problem(field, getattr(candidate, field.name)) for field in list_fields(Candidate) if field.knob}
    bad += [FieldViolation(f"candidate.{name}", problem) for name, problem in problems.items() if problem]
    if bad:
        raise PolicyInvalid(bad)
    return candidate


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
