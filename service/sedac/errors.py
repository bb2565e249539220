"""Every error that SEDAC raises on purpose.

    SedacError
    |- ConfigError            a setting or flag is wrong, unknown, or at odds with another
    |- PolicyInvalid          a policy has bad fields (all of them are listed)
    |- StaleEtag              somebody else changed the policy since it was read
    |- RevisionNotFound       no such revision (or no policy yet)
    |- RevisionCompacted      the revision was there and has been compacted away
    |- RequestIdReused        a request_id was sent again with another request
    |- StoreFailed            the control service's database can't be read or written
    |- EngineReplaced         a newer connection of the same engine took over
    |- ProbeSetNotFound       the control service has no such probe set
    |- ProbeSetExists         a name was uploaded again with other content
    |- ProbeSetInUse          a probe set can't be deleted while something names it
    |- RolloutNotFound        no such roll-out (or none yet)
    |- RolloutConflict        the roll-out's state does not allow this change
    |- LimitExceeded          a size, rate or number of streams is over its limit
    |- Unauthenticated        nobody proved who is calling
    |- PermissionDenied       the caller's role may not do this
    |- ArtifactError          a probe set is missing, broken, or made for another model
    |- UnsupportedModel       the model or the engine's layout can't carry SEDAC
    |- ControlUnavailable     the control service can't be reached or did not answer in time
    |- NotSynced              an engine refused a revision or did not confirm it in time
    `- BenchmarkFailed        a server that a benchmark started ended, refused a request, or broke off

Messages name the value, the limit and the remedy. Only the gRPC servicer turns them into status codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class SedacError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(SedacError):
    """A setting or flag is wrong, unknown, or at odds with another."""


@dataclass(frozen=True)
class FieldViolation:
    """One bad field: its path in the proto message (`checkpoints[1].threshold`) and what to do about it."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class PolicyInvalid(SedacError):
    """A policy was refused whole; `violations` lists every field at fault."""

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        self.violations = tuple(violations)
        super().__init__("policy refused: " + "; ".join(map(str, self.violations)))


class StaleEtag(SedacError):
    """The etag sent is not the one in force."""


class RevisionNotFound(SedacError):
    """No such revision of the policy."""


class RevisionCompacted(SedacError):
    """The revision was there and has been compacted away."""


class RequestIdReused(SedacError):
    """A request_id was sent again with another request."""


class StoreFailed(SedacError):
    """The control service's database can't be read or written."""


class EngineReplaced(SedacError):
    """A newer connection of the same engine took over."""


class ProbeSetNotFound(SedacError):
    """The control service has no such probe set."""


class ProbeSetExists(SedacError):
    """A name was uploaded again with other content."""


class ProbeSetInUse(SedacError):
    """A probe set can't be deleted while something names it."""


class RolloutNotFound(SedacError):
    """No such roll-out, or none yet."""


class RolloutConflict(SedacError):
    """The roll-out's state does not allow this change."""


class LimitExceeded(SedacError):
    """A size, rate or number of streams is over its limit."""


class Unauthenticated(SedacError):
    """Nobody proved who is calling."""


class PermissionDenied(SedacError):
    """The caller's role may not do this."""


class ArtifactError(SedacError):
    """A probe set is missing, broken, or made for another model."""


class UnsupportedModel(SedacError):
    """The model or the engine's layout can't carry SEDAC."""


class ControlUnavailable(SedacError):
    """The control service can't be reached or did not answer in time."""


class NotSynced(SedacError):
    """An engine refused a revision or did not confirm it in time."""


class BenchmarkFailed(SedacError):
    """A server that a benchmark started ended or did not get ready, refused a request, or broke off."""
