"""SEDAC_POLICY makes the first policy of the running product, the demo model's certificate included."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.errors import RevisionNotFound

from testing.served import start, stop

pytestmark = [pytest.mark.e2e, pytest.mark.thorough]
FILE = Path(__file__).resolve().parents[2] / "probes" / "sedac_demo" / "policy.json"
WAIT_SECONDS = 120


def test_the_demo_models_certified_policy_is_the_first_everywhere(tmp_path):
    served = start(tmp_path, SEDAC_POLICY=str(FILE))
    try:
        with ControlClient(served.control_address, timeout_seconds=60) as client:
            policy = wire.policy_from_proto(_wait_for_policy(client))
        assert (policy.certificate.tier, policy.default_tier) == ("certified", "certified")
        assert served.read_metrics()["sedac_policy_certified"] == 1
        answer = served.make_openai().completions.create(model="sedac-demo", prompt="def add(a, b):", max_tokens=8, temperature=0)
        assert answer.choices[0].text
    finally:
        assert stop(served) == 0, served.log.read_text()[-4000:]


def _wait_for_policy(client: ControlClient):
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return client.get_policy()
        except RevisionNotFound:
            assert time.monotonic() < deadline, "the engine never connected"
            time.sleep(0.5)
