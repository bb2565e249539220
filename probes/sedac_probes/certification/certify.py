"""Certify: show on n requests that the mean loss of a policy's answers is at most eps, and write the fastest policy that shows it.

The requests are answered exactly and by one member of a family after the other, from the safest to the fastest, until one fails its
test (`bounds`). The last that passed is certified: over all draws of the requests, at most delta of the runs certify a member whose
mean loss on such requests is above eps. That holds for requests like these, drawn independently, and for eps and delta chosen before.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sedac.errors import ConfigError
from sedac.policy.certificate import Certificate
from sedac.policy.check import validate
from sedac.policy.digest import get_knobs_digest
from sedac.policy.model import Policy
from sedac.policy.weights import get_weights_digest
from sedac.probe.manifest import read_manifest

from sedac_probes.certification import bounds
from sedac_probes.certification.family import TIER, Member, make_layout, make_policy
from sedac_probes.certification.session import Session, Settings
from sedac_probes.corpus import Document


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One member of the family after its test."""

    member: Member
    saved: float
    """Share of the MLP FLOPs of generated tokens that was saved."""
    mean_loss: float
    upper_limit: float
    """Upper limit of the mean loss of all requests, at 1 - delta, of this member by itself."""
    p_value: float
    num_needed: int | None
    """Number of requests with losses like these that would pass. None where it passed already, or no number would do."""
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Certification:
    """A whole test: what was run, and what it showed."""

    settings: Settings
    outcomes: tuple[Outcome, ...]
    """Outcomes of the members that were run."""
    untested: tuple[Member, ...]
    """Members behind the first failure."""
    exact_loss: float
    """Mean loss of the exact answers themselves, because rounding differs between generating a token and reading it."""
    data_sha256: str
    engine: str
    num_documents: int
    policy: Policy | None
    """Policy with the certificate. None where no member passed."""

    @property
    def certified(self) -> Outcome | None:
        """The fastest member that passed."""
        return [o for o in self.outcomes if o.passed][-1] if self.policy else None


def certify(model: str, probe_set: Path, documents: Sequence[Document], family: Sequence[Member], settings: Settings, kept: Path) -> Certification:
    """Run the test; `kept` holds what finished members answered.

    Raises:
        ConfigError: settings out of range, too few documents, or a loss outside [0, 1].
        PolicyInvalid: a member names a level that the probe set does not have.
    """
    if not family:
        raise ConfigError("the family has no member; name at least one with --member")
    manifest = read_manifest(probe_set)
    policies = [make_policy(manifest, member) for member in family]
    session = Session(model, probe_set, documents, settings, kept)
    outcomes: list[Outcome] = []

    def test() -> Iterator[float]:
        """Test the members one after the other, and yield their p-values."""
        for member, policy in zip(family, policies, strict=True):
            outcomes.append(_judge(member, *session.answer(policy, TIER, member.label), settings))
            yield outcomes[-1].p_value

    last = bounds.find_last_rejected(test(), settings.delta)
    return Certification(
        settings=settings,
        outcomes=tuple(outcomes),
        untested=tuple(family[len(outcomes) :]),
        exact_loss=session.get_exact_loss(),
        data_sha256=session.data_sha256,
        engine=session.engine,
        num_documents=session.num_documents,
        policy=None if last is None else _sign(policies[last], outcomes[last], session, Path(model).name),
    )


def _judge(member: Member, losses: list[float], saved: float, settings: Settings) -> Outcome:
    eps, delta, procedure = settings.eps, settings.delta, settings.procedure
    p_value = float(bounds.get_p_value(losses, eps, procedure, delta))
    passed = p_value <= delta
    return Outcome(
        member=member,
        saved=saved,
        mean_loss=sum(losses) / len(losses),
        upper_limit=float(bounds.get_upper_limit(losses, delta, procedure)),
        p_value=p_value,
        num_needed=None if passed else bounds.get_num_needed(losses, eps, delta, procedure),
        passed=passed,
    )


def _sign(policy: Policy, outcome: Outcome, session: Session, model: str) -> Policy:
    settings = session.settings
    certificate = Certificate(
        tier=TIER,
        model=model,
        weights_sha256=session.weights_sha256,
        probe_set_sha256=session.manifest.sha256,
        knobs_sha256=get_knobs_digest(policy, TIER),
        engine=session.engine,
        loss=settings.loss,
        eps=settings.eps,
        delta=settings.delta,
        procedure=settings.procedure,
        num_requests=settings.num_requests,
        mean_loss=outcome.mean_loss,
        upper_limit=outcome.upper_limit,
        data_sha256=session.data_sha256,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    return replace(policy, certificate=certificate)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a certified tier lost on requests that had no part in its certificate."""

    certificate: Certificate
    num_requests: int
    num_documents: int
    saved: float
    """Share of the MLP FLOPs of generated tokens that was saved."""
    mean_loss: float
    upper_limit: float
    """Upper limit of the mean loss of all such requests, at 1 - delta."""
    data_sha256: str

    @property
    def holds(self) -> bool:
        """Whether the observed mean is within the certified eps."""
        return self.mean_loss <= self.certificate.eps


def check(model: str, probe_set: Path, policy: Policy, documents: Sequence[Document], settings: Settings, kept: Path) -> Observation:
    """Answer fresh requests under a policy's certified tier; loss, eps, delta and procedure are its certificate's, not `settings`'.

    Raises:
        ConfigError: the policy has no certificate, or it is for these very requests.
        PolicyInvalid: its certificate is for other knobs, weights or probes.
    """
    certificate = policy.certificate
    if certificate is None:
        raise ConfigError("the policy has no certificate; `sedac-probes certify` writes one that has")
    validate(policy, make_layout(read_manifest(probe_set), get_weights_digest(model)))
    procedure = bounds.read_procedure(certificate.procedure)
    stated = replace(settings, loss=certificate.loss, eps=certificate.eps, delta=certificate.delta, procedure=procedure)
    session = Session(model, probe_set, documents, stated, kept)
    if session.data_sha256 == certificate.data_sha256:
        raise ConfigError("these are the very requests of the certificate; name other texts or another --seed")
    losses, saved = session.answer(replace(policy, enabled=True), certificate.tier, certificate.tier)
    return Observation(
        certificate=certificate,
        num_requests=len(losses),
        num_documents=session.num_documents,
        saved=saved,
        mean_loss=sum(losses) / len(losses),
        upper_limit=float(bounds.get_upper_limit(losses, stated.delta, stated.procedure)),
        data_sha256=session.data_sha256,
    )
