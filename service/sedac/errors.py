"""Every error that SEDAC raises on purpose.

    SedacError
    |- ConfigError            a setting or flag is wrong, unknown, or at odds with another
    |- PolicyInvalid          a policy has bad fields (all of them are listed)
    |- StaleEtag              somebody else changed the policy since it was read
    |- RevisionNotFound       no such revision (or no policy yet)
    |- RequestIdReused        a request_id was sent again with another request
    |- StoreFailed            the control service's database can't be read or written
    |- EngineReplaced         a newer connection of the same engine took over
    |- ArtifactError          a probe set is missing, broken, or made for another model
    |- UnsupportedModel       the model or the engine's layout can't carry SEDAC
    |- ControlUnavailable     the control service can't be reached or did not answer in time
    `- NotSynced              an engine refused a revision or did not confirm it in time

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


class RequestIdReused(SedacError):
    """A request_id was sent again with another request."""


class StoreFailed(SedacError):
    """The control service's database can't be read or written."""


class EngineReplaced(SedacError):
    """A newer connection of the same engine took over."""


class ArtifactError(SedacError):
    """A probe set is missing, broken, or made for another model."""


class UnsupportedModel(SedacError):
    """The model or the engine's layout can't carry SEDAC."""


class ControlUnavailable(SedacError):
    """The control service can't be reached or did not answer in time."""


class NotSynced(SedacError):
    """An engine refused a revision or did not confirm it in time."""
