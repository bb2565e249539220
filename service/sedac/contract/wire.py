"""The contract's messages from and to plain Python; the only place that knows both forms.

Used by the control service, the agent and the client.
"""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from sedac import errors
from sedac.contract.stats import CONTROLLER_STATES, ControllerStats, DraftingStats, Evidence, Stats
from sedac.contract.v1 import control_pb2, drafting_pb2, evidence_pb2
from sedac.errors import FieldViolation, PolicyInvalid, SedacError
from sedac.policy.certificate import Certificate
from sedac.policy.layout import Layout
from sedac.policy.model import (
    CANARY,
    FULL,
    SKIP,
    STABLE,
    Adaptation,
    Audit,
    Canary,
    Checkpoint,
    GuardAction,
    Phase,
    Policy,
    Rule,
    Scope,
    Speculation,
    Tier,
)

AUTHOR_METADATA = "sedac-author"
"""request metadata: who asks for a change, in percent-encoded UTF-8"""
_DOMAIN = "sedac"
_MAX_VIOLATIONS, _MAX_FIELD_CHARS, _MAX_DESCRIPTION_CHARS, _MAX_MESSAGE_CHARS = 8, 64, 256, 1000  # gRPC refuses trailers from 8 KiB on
_PHASES: dict[control_pb2.Phase, Phase] = {control_pb2.PHASE_DECODE: "decode", control_pb2.PHASE_ALL: "all"}
_SCOPES: dict[control_pb2.Scope, Scope] = {control_pb2.SCOPE_TOKEN: "token", control_pb2.SCOPE_BATCH: "batch"}
_RULES: dict[control_pb2.Rule, Rule] = {control_pb2.RULE_FIRST: "first", control_pb2.RULE_ACCUMULATE: "accumulate", control_pb2.RULE_SINGLE: "single"}
_ACTIONS: dict[control_pb2.GuardAction, GuardAction] = {control_pb2.GUARD_ACTION_ROLLBACK: "rollback", control_pb2.GUARD_ACTION_EXACT: "exact"}
_PHASE_NUMBERS, _SCOPE_NUMBERS = {word: number for number, word in _PHASES.items()}, {word: number for number, word in _SCOPES.items()}
_RULE_NUMBERS = {word: number for number, word in _RULES.items()}
_ACTION_NUMBERS = {word: number for number, word in _ACTIONS.items()}
_CONTROLLER_STATES = {word: getattr(drafting_pb2, f"CONTROLLER_STATE_{word.upper()}") for word in CONTROLLER_STATES}
_CONTROLLER_WORDS = {number: word for word, number in _CONTROLLER_STATES.items()}
_ARM_NUMBERS = {STABLE: evidence_pb2.ARM_STABLE, CANARY: evidence_pb2.ARM_CANARY}
_N = TypeVar("_N", bound=int)
_T = TypeVar("_T")
_D = TypeVar("_D", Certificate, ControllerStats, DraftingStats)


def policy_from_proto(message: control_pb2.Policy) -> Policy:
    """Read the settable fields; values are not validated beyond the enums.

    Raises:
        PolicyInvalid: an enum holds a number that this version does not know.
    """
    bad: list[FieldViolation] = []
    policy = Policy(
        enabled=message.enabled,
        probe_set=message.probe_set,
        checkpoints=tuple(Checkpoint(layer=c.layer, threshold=c.threshold, **_read(c, "weight", "target")) for c in message.checkpoints),
        phase=_read_word(bad, message, "phase", _PHASES, control_pb2.Phase),
        scope=_read_word(bad, message, "scope", _SCOPES, control_pb2.Scope),
        rule=_read_word(bad, message, "rule", _RULES, control_pb2.Rule),
        sensitivity=message.sensitivity,
        tiers=tuple(
            Tier(name=t.name, floor=t.floor or FULL, level=t.level or SKIP, soft_exit=t.soft_exit, **_read(t, "threshold_scale"))
            for t in message.tiers
        ),
        default_tier=message.default_tier or Policy.default_tier,
        allow_overrides=message.allow_overrides,
        adaptation=_read_adaptation(message.adaptation),
        certificate=certificate_from_proto(message.certificate) if message.HasField("certificate") else None,
        audit=Audit(
            share=message.audit.share,
            action=_read_word(bad, message.audit, "action", _ACTIONS, control_pb2.GuardAction, path="audit."),
            **_read(message.audit, "max_mismatch", "max_nll_difference", "confidence"),
        ),
        speculation=speculation_from_proto(message.speculation),
        **_read(message, "decay"),
    )
    if bad:
        raise PolicyInvalid(bad)
    return policy


def certificate_from_proto(message: control_pb2.Certificate) -> Certificate:
    """Read a certificate; values are not validated."""
    return _read_all(Certificate, message)


def speculation_from_proto(message: control_pb2.Speculation) -> Speculation:
    """Read the knobs of self-speculation; values are not validated."""
    return Speculation(max_tokens=message.max_tokens, tiers=tuple(message.tiers), **_read(message, "enabled", "min_confidence", "adaptive"))


def _read_adaptation(message: control_pb2.Adaptation) -> Adaptation:
    return Adaptation(
        enabled=message.enabled,
        frozen=message.frozen,
        target_exit_rates=tuple(message.target_exit_rates),
        min_threshold=message.min_threshold,
        generation=message.generation,
        **_read(message, "alpha", "warmup_steps", "window_tokens", "max_threshold"),
    )


def _read_all(kind: type[_D], message: Message, **read: Any) -> _D:
    """Return a dataclass with the fields that were `read` and those of the message."""
    found = {field.name: getattr(message, field.name) for field in dataclasses.fields(kind) if field.name not in read}
    return kind(**found, **read)


def _read(message: Message, *names: str) -> dict[str, Any]:
    """Return the optional fields that are set; the others keep the defaults of policy/model.py, so that these are given once."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _read_word(bad: list[FieldViolation], message: Message, name: str, words: dict[_N, _T], enum: Any, path: str = "") -> _T:
    number = getattr(message, name)
    if number and number not in words:
        bad.append(FieldViolation(path + name, f"{number} is unknown; use {' or '.join(map(enum.Name, words))}"))
    return words.get(number, next(iter(words.values())))


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
        checkpoints=[control_pb2.Checkpoint(**vars(c)) for c in policy.checkpoints],
        phase=_PHASE_NUMBERS[policy.phase],
        scope=_SCOPE_NUMBERS[policy.scope],
        rule=_RULE_NUMBERS[policy.rule],
        decay=policy.decay,
        sensitivity=policy.sensitivity,
        tiers=[control_pb2.Tier(**vars(t)) for t in policy.tiers],
        default_tier=policy.default_tier,
        allow_overrides=policy.allow_overrides,
        adaptation=control_pb2.Adaptation(**vars(policy.adaptation)),
        certificate=control_pb2.Certificate(**vars(policy.certificate)) if policy.certificate else None,
        audit=control_pb2.Audit(**{**vars(policy.audit), "action": _ACTION_NUMBERS[policy.audit.action]}),
        speculation=control_pb2.Speculation(**vars(policy.speculation)),
    )
    if create_time is not None:
        message.revision_create_time.FromDatetime(create_time)
    return message


def layout_from_hello(hello: control_pb2.EngineHello) -> Layout:
    """Read what an engine has attached."""
    return Layout(
        num_layers=hello.num_layers,
        hidden_size=hello.hidden_size,
        checkpoint_layers=tuple(hello.checkpoint_layers),
        probe_set=hello.probe_set,
        levels=tuple(hello.levels) or (FULL, SKIP),
        weights_sha256=hello.weights_sha256,
        probe_set_sha256=hello.probe_set_sha256,
        max_rank=hello.max_rank,
        levels_sha256=hello.levels_sha256,
        draft=hello.draft,
        max_draft_tokens=hello.max_draft_tokens,
    )


def stats_to_report(stats: Stats) -> control_pb2.EngineReport:
    """Write a worker's totals."""
    parts = {
        "checkpoints": [control_pb2.CheckpointReport(**vars(c)) for c in stats.checkpoints],
        "tiers": [control_pb2.TierReport(**vars(t)) for t in stats.tiers],
        "ranks": [control_pb2.RankReport(**vars(r)) for r in stats.ranks],
        "drafting": drafting_to_proto(stats.drafting) if stats.drafting else None,
    }
    return control_pb2.EngineReport(**{**vars(stats), **parts})


def drafting_to_proto(drafting: DraftingStats) -> drafting_pb2.Drafting:
    """Write the totals of self-speculation and the controller's state."""
    controller = [drafting_pb2.DraftingController(**{**vars(c), "state": _CONTROLLER_STATES[c.state]}) for c in drafting.controller]
    return drafting_pb2.Drafting(**{**vars(drafting), "controller": controller})


def drafting_from_proto(message: drafting_pb2.Drafting) -> DraftingStats:
    """Read the totals of self-speculation and the controller's state; a state that this version does not know reads `unknown`."""
    controller = tuple(_read_all(ControllerStats, c, state=_CONTROLLER_WORDS.get(c.state, "unknown")) for c in message.controller)
    return _read_all(DraftingStats, message, lengths=tuple(message.lengths), accepted_at=tuple(message.accepted_at), controller=controller)


def evidence_to_proto(evidence: Evidence) -> evidence_pb2.Evidence:
    """Write what an engine measured of one tier under one arm."""
    counts = {**vars(evidence), "arm": _ARM_NUMBERS[evidence.arm]}
    moments = {name: evidence_pb2.Moments(**vars(counts[name])) for name in ("first_token_seconds", "token_seconds")}
    return evidence_pb2.Evidence(**(counts | moments))


def canary_from_proto(message: control_pb2.Canary) -> Canary:
    """Read a roll-out's candidate; its policy is not validated.

    Raises:
        PolicyInvalid: the number or the share can't be, or an enum of the policy holds a number that this version does not know.
    """
    bad = [] if message.rollout > 0 else [FieldViolation("canary.rollout", f"{message.rollout} is no number of a roll-out; they count from 1")]
    if not 0 <= message.share <= 1:
        bad.append(FieldViolation("canary.share", f"{message.share} is outside 0..1"))
    try:
        policy = policy_from_proto(message.policy)
    except PolicyInvalid as error:
        bad += [FieldViolation(f"canary.policy.{v.field}", v.description) for v in error.violations]
    if bad:
        raise PolicyInvalid(bad)
    return Canary(rollout=message.rollout, policy=policy, share=message.share)


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
