"""A certificate: what was shown of one tier of a policy, on which model, with which probes, on how many requests.

`sedac-probes certify` writes it into the policy; the control service and every engine refuse one that is for other knobs, weights or
probes than theirs. It says nothing of requests that differ from those it was made on.
"""

from __future__ import annotations

import datetime
import functools
from typing import Annotated

from pydantic.dataclasses import dataclass

from sedac.errors import FieldViolation
from sedac.policy.knob import FORBID_UNKNOWN, Knob, find_violations

_stated = functools.partial(Knob, option="", max_length=256)
_digest = functools.partial(Knob, option="", pattern="[0-9a-f]{64}", wrong="is no sha256", remedy="give 64 of 0-9 and a-f")
_share = functools.partial(Knob, option="", gt=0, lt=1, remedy="0.05 is usual")


def _find_date_problem(date: str) -> str:
    try:
        datetime.datetime.fromisoformat(date)
    except ValueError:
        return f"{date[:80]!r} is no ISO 8601 date, such as 2026-11-21"
    return ""


@dataclass(frozen=True, kw_only=True, config=FORBID_UNKNOWN)
class Certificate:
    """Over all draws of `num_requests` requests, at most `delta` of such certificates name a tier whose mean loss is above `eps`."""

    tier: Annotated[str, _stated(help="Tier of the policy that carries the certificate.", min_length=1)]
    model: Annotated[str, _stated(help="The model as it was named, for people; weights_sha256 decides.")]
    weights_sha256: Annotated[str, _digest(help="Of the model's weights, see sedac.policy.weights.")]
    probe_set_sha256: Annotated[str, _digest(help="Of the probe set.")]
    knobs_sha256: Annotated[str, _digest(help="Of all that decides how the tier's requests are computed, see sedac.policy.digest.")]
    engine: Annotated[str, _stated(help="Versions of vLLM and SEDAC, device and dtype, for people.")]
    loss: Annotated[str, _stated(help="mismatch, nll, divergence or module:function.", min_length=1)]
    eps: Annotated[float, _share(help="The mean loss that was tested for; {limits}.")]
    delta: Annotated[float, _share(help="Share of certificates that may be wrong; {limits}.")]
    procedure: Annotated[str, _stated(help="The test, such as wsr or hb.", min_length=1)]
    num_requests: Annotated[int, Knob(help="Requests of the test.", option="", ge=1, le=2**63 - 1, remedy="a certificate rests on requests")]
    mean_loss: Annotated[float, Knob(help="The loss that was observed.", option="")]
    upper_limit: Annotated[float, Knob(help="Of the mean loss, at 1 - delta.", option="")]
    data_sha256: Annotated[str, _digest(help="Of the requests.")]
    date: Annotated[str, Knob(help="ISO 8601.", option="", check=_find_date_problem)]

    def describe(self) -> str:
        """Return one line for people: `balanced certified: mismatch <= 0.05 at 95 %, 500 requests, 2026-11-21`."""
        confidence = f"{100 * (1 - self.delta):.6g} %"
        return f"{self.tier} certified: {self.loss} <= {self.eps:g} at {confidence}, {self.num_requests} requests, {self.date}"

    def find_violations(self) -> list[FieldViolation]:
        """Return the fields that no certificate can have, whatever the policy and the engine."""
        return list(find_violations(self, "certificate."))
