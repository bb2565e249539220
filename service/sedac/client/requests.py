"""Every request of the contract, made once for both clients: a `Call` says which method, with what, and whether it may be sent again.

A change carries a request_id of its own where the caller gives none, so that sending it again can't apply it twice.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypedDict, TypeVar

from google.protobuf import field_mask_pb2

from sedac.contract import wire
from sedac.contract.v1 import audit_log_pb2, control_pb2, probe_sets_pb2, rollouts_pb2
from sedac.policy.model import Policy

_T = TypeVar("_T")
Service = Literal["Control", "ProbeSets", "Rollouts", "AuditLog"]


@dataclass(frozen=True, kw_only=True)
class Call(Generic[_T]):
    """One call of the service, answered by a `_T`, or by a stream of them."""

    service: Service
    method: str
    request: Any
    """The message. For an upload, a function that makes the stream of messages, anew for each attempt."""
    is_repeatable: bool = True
    """Whether it may be sent again after UNAVAILABLE, because it changes nothing or the service recognises it."""

    def make_request(self) -> Any:
        """Return what the stub takes."""
        return self.request() if callable(self.request) else self.request


class Knobs(TypedDict, total=False):
    """How a roll-out is run; what is left out gets the service's defaults."""

    shares: Sequence[float]
    """Shares of the requests that the candidate serves, one per step, ascending, over 0 to 1. The default is 0.05, 0.25, 0.5."""
    interval_seconds: float
    """Seconds between two analyses. The default is 60."""
    min_requests: int
    """Requests that each step needs before a verdict. The default is 100."""
    max_mismatch: float
    """Limit of the mismatch of the candidate's audited answers, 0 to 1."""
    max_nll_difference: float
    """Limit of what the candidate's audited answers lose in log-probability, in nats per token."""
    max_latency_ratio: float
    """Limit of the ratio of the candidate's seconds per token to those of the policy in force."""
    max_error_share: float
    """Limit of the share of errors among the candidate's finished requests, 0 to 1."""
    confidence: float
    """Confidence of the verdicts, 0.5 to below 1. The default is 0.95."""
    comment: str
    request_id: str


Act = Literal["promote", "pause", "resume", "abort"]
_BOUNDS = ("max_mismatch", "max_nll_difference", "max_latency_ratio", "max_error_share", "confidence")


def get_policy(revision: int = 0) -> Call[control_pb2.Policy]:
    """Ask for the policy in force, or one revision."""
    return Call(service="Control", method="GetPolicy", request=control_pb2.GetPolicyRequest(revision=revision))


def update_policy(
    policy: Policy, *, fields: Sequence[str], etag: str, comment: str, validate_only: bool, request_id: str
) -> Call[control_pb2.Policy]:
    """Ask for a change of `fields`; empty: all."""
    request = control_pb2.UpdatePolicyRequest(
        policy=wire.policy_to_proto(policy, etag=etag, comment=comment),
        update_mask=field_mask_pb2.FieldMask(paths=fields),
        validate_only=validate_only,
        request_id="" if validate_only else request_id or _make_id(),
    )
    return Call(service="Control", method="UpdatePolicy", request=request)


def roll_back(revision: int, *, comment: str, etag: str, request_id: str) -> Call[control_pb2.Policy]:
    """Ask for an older revision's content as the newest."""
    request = control_pb2.RollbackPolicyRequest(revision=revision, comment=comment, etag=etag, request_id=request_id or _make_id())
    return Call(service="Control", method="RollbackPolicy", request=request)


def list_revisions(page_token: str = "", page_size: int = 0) -> Call[control_pb2.ListPolicyRevisionsResponse]:
    """Ask for a page of revisions, newest first."""
    request = control_pb2.ListPolicyRevisionsRequest(page_token=page_token, page_size=page_size)
    return Call(service="Control", method="ListPolicyRevisions", request=request)


def watch_policy(from_revision: int) -> Call[control_pb2.Policy]:
    """Ask for all revisions from one on."""
    return Call(service="Control", method="WatchPolicy", request=control_pb2.WatchPolicyRequest(from_revision=from_revision))


def get_status() -> Call[control_pb2.Status]:
    """Ask for the policy, the engines, the roll-out and what audits found."""
    return Call(service="Control", method="GetStatus", request=control_pb2.GetStatusRequest())


def watch_status(interval_seconds: float) -> Call[control_pb2.Status]:
    """Ask for the status as it changes."""
    request = control_pb2.WatchStatusRequest(interval_seconds=interval_seconds)
    return Call(service="Control", method="WatchStatus", request=request, is_repeatable=False)


def list_engines(page_token: str = "") -> Call[control_pb2.ListEnginesResponse]:
    """Ask for a page of engines, by id."""
    return Call(service="Control", method="ListEngines", request=control_pb2.ListEnginesRequest(page_token=page_token))


def watch_engines() -> Call[control_pb2.WatchEnginesResponse]:
    """Ask for the engines as their states change."""
    return Call(service="Control", method="WatchEngines", request=control_pb2.WatchEnginesRequest(), is_repeatable=False)


def upload_probe_set(make_parts: Callable[[], Iterator[probe_sets_pb2.UploadProbeSetRequest]]) -> Call[probe_sets_pb2.ProbeSet]:
    """Send a set; the same again is answered as before."""
    return Call(service="ProbeSets", method="UploadProbeSet", request=make_parts)


def list_probe_sets(page_token: str = "") -> Call[probe_sets_pb2.ListProbeSetsResponse]:
    """Ask for a page of probe sets, by name."""
    return Call(service="ProbeSets", method="ListProbeSets", request=probe_sets_pb2.ListProbeSetsRequest(page_token=page_token))


def get_probe_set(name: str) -> Call[probe_sets_pb2.ProbeSet]:
    """Ask for one set."""
    return Call(service="ProbeSets", method="GetProbeSet", request=probe_sets_pb2.GetProbeSetRequest(name=name))


def delete_probe_set(name: str) -> Call[probe_sets_pb2.DeleteProbeSetResponse]:
    """Ask for a set to be deleted; never sent again, for the second answer would be that there is none."""
    request = probe_sets_pb2.DeleteProbeSetRequest(name=name)
    return Call(service="ProbeSets", method="DeleteProbeSet", request=request, is_repeatable=False)


def download_probe_set(name: str, sha256: str) -> Call[probe_sets_pb2.DownloadProbeSetResponse]:
    """Ask for a set's bytes."""
    request = probe_sets_pb2.DownloadProbeSetRequest(name=name, sha256=sha256)
    return Call(service="ProbeSets", method="DownloadProbeSet", request=request)


def start_rollout(candidate: Policy | int, knobs: Knobs) -> Call[rollouts_pb2.Rollout]:
    """Ask for a roll-out of a policy, or of the content of a revision."""
    bounds: Any = {name: value for name, value in knobs.items() if name in _BOUNDS and value is not None}
    plain: Any = {name: value for name, value in knobs.items() if name not in _BOUNDS and value is not None}
    plain["request_id"] = plain.get("request_id") or _make_id()
    what: Any = {"revision": candidate} if isinstance(candidate, int) else {"policy": wire.policy_to_proto(candidate)}
    request = rollouts_pb2.StartRolloutRequest(**what, **plain, bounds=rollouts_pb2.RolloutBounds(**bounds))
    return Call(service="Rollouts", method="StartRollout", request=request)


def get_rollout(name: str | int = "") -> Call[rollouts_pb2.Rollout]:
    """Ask for one roll-out; empty: the one under way, or the newest."""
    return Call(service="Rollouts", method="GetRollout", request=rollouts_pb2.GetRolloutRequest(name=name_rollout(name)))


def list_rollouts(page_token: str = "") -> Call[rollouts_pb2.ListRolloutsResponse]:
    """Ask for a page of roll-outs, newest first."""
    return Call(service="Rollouts", method="ListRollouts", request=rollouts_pb2.ListRolloutsRequest(page_token=page_token))


def change_rollout(act: Act, name: str | int, *, comment: str, etag: str) -> Call[rollouts_pb2.Rollout]:
    """Ask for a roll-out to be promoted, paused, resumed or aborted.

    Never sent again: done once, it would be refused the second time, and the caller would take what was done for refused.
    """
    request = rollouts_pb2.ChangeRolloutRequest(name=name_rollout(name), comment=comment, etag=etag)
    return Call(service="Rollouts", method=f"{act.capitalize()}Rollout", request=request, is_repeatable=False)


def list_audit_entries(page_token: str = "") -> Call[audit_log_pb2.ListAuditEntriesResponse]:
    """Ask for a page of the audit log, newest first."""
    return Call(service="AuditLog", method="ListAuditEntries", request=audit_log_pb2.ListAuditEntriesRequest(page_token=page_token))


def name_rollout(name: str | int) -> str:
    """Return a roll-out's full name from its name or number: 7 and "7" are "rollouts/7"."""
    return f"rollouts/{name}" if str(name).isdecimal() else str(name)


def _make_id() -> str:
    return uuid.uuid4().hex
