"""The knobs of self-speculation on a running server: each changes what is drafted, at once, and none changes an answer."""

from __future__ import annotations

import json
import time
import urllib.request
from dataclasses import replace

import openai
import pytest
from sedac.app.doctor import examine_engine
from sedac.client.client import ControlClient
from sedac.errors import PolicyInvalid
from sedac.policy.model import Policy, Speculation
from sedac.probe.draft import save_draft
from sedac.probe.draft_manifest import REDUCED, DraftManifest

from testing.served import Served, start, stop

pytestmark = pytest.mark.e2e

DRAFT = DraftManifest(name="halves", kind=REDUCED, model="sedac-demo", hidden_size=256, num_layers=12, depth=12, level="contextual-50", max_tokens=3)
FIXED = Speculation(adaptive=False, min_confidence=0.0)
NUM_TOKENS = 48
DRAFTING = {"SEDAC_DRAFT_TOKENS": "4", "SEDAC_DRAFT_ADAPTIVE": "0"}


def _get_status(served: Served) -> dict:
    with urllib.request.urlopen(f"{served.url}/sedac/status", timeout=30) as answer:
        return json.load(answer)


def _ask(served: Served, **xargs: object) -> tuple[str, list[int]]:
    """Return the text, and the steps by number of draft tokens that it took, from 0 on."""
    before = _get_lengths(served)
    ask = {"model": "sedac-demo", "prompt": "def read(self, size):\n    ", "max_tokens": NUM_TOKENS, "temperature": 0}
    answer = served.make_openai().completions.create(**ask, extra_body={"ignore_eos": True, "vllm_xargs": xargs})
    return answer.choices[0].text, [now - then for now, then in zip(_get_lengths(served), before, strict=True)]


def _get_lengths(served: Served) -> list[int]:
    time.sleep(1.0)  # the agent reads every 0.25 s
    return _get_status(served)["stats"]["drafting"]["lengths"]


def test_every_knob_of_self_speculation_acts_while_serving(tmp_path):
    save_draft(tmp_path / "draft", DRAFT, None)
    served = start(tmp_path, "--dtype", "float32", "--draft", str(tmp_path / "draft"), SEDAC_STRICT="1", **DRAFTING)
    try:
        with ControlClient(served.control_address, author="e2e") as client:
            _check(served, client)
    finally:
        assert stop(served) == 0, served.log.read_text()[-4000:]


def _check(served: Served, client: ControlClient) -> None:
    def change(knobs: Speculation) -> None:
        client.wait_until_synced(client.update_policy(Policy(speculation=knobs), fields=["speculation"]).revision, 30)

    status = _get_status(served)
    assert (status["layout"]["draft"], status["layout"]["max_draft_tokens"]) == ("reduced", 4)
    assert status["policy"]["speculation"] == {"enabled": True, "max_tokens": 4, "min_confidence": None, "adaptive": False, "tiers": []}
    (engine,) = client.get_status().engines
    assert (engine.engine.draft, engine.engine.max_draft_tokens) == ("reduced", 4)
    found = next(examine_engine(served.url))
    assert (found.name, found.state) == ("running engine", "ok")
    assert found.detail.endswith("draft reduced, up to 4 tokens")

    change(replace(FIXED, enabled=False))
    exact, lengths = _ask(served, sedac_tier="exact")
    assert sum(lengths[1:]) == 0
    bounded, _ = _ask(served, sedac_tier="balanced")

    change(FIXED)
    text, lengths = _ask(served, sedac_tier="exact")
    assert text == exact
    assert lengths[3] > 0, "0 is the draft's own number, of which there are 3, not the engine's room for 4"
    assert lengths[4] == 0
    change(replace(FIXED, max_tokens=4))
    text, lengths = _ask(served, sedac_tier="exact")
    assert text == exact
    assert lengths[4] > 0
    change(replace(FIXED, max_tokens=1))
    text, lengths = _ask(served, sedac_tier="exact")
    assert text == exact
    assert lengths[1] > 0
    assert sum(lengths[2:]) == 0
    change(replace(FIXED, min_confidence=1.0))
    text, lengths = _ask(served, sedac_tier="exact")
    assert text == exact
    assert lengths[1] > sum(lengths[2:]), "a draft that is not certain is the last one"

    change(replace(FIXED, tiers=("balanced",)))
    text, lengths = _ask(served, sedac_tier="exact")
    assert (text, sum(lengths[1:])) == (exact, 0)
    text, lengths = _ask(served, sedac_tier="balanced")
    assert text == bounded
    assert sum(lengths[1:]) > 0

    change(FIXED)
    for wish in (False, "off"):
        text, lengths = _ask(served, sedac_tier="exact", sedac_speculation=wish)
        assert (text, sum(lengths[1:])) == (exact, 0)
    text, lengths = _ask(served, sedac_tier="exact", sedac_speculation=True)
    assert text == exact
    assert sum(lengths[1:]) > 0
    with pytest.raises(openai.BadRequestError, match="sedac_speculation is neither true nor false"):
        _ask(served, sedac_speculation="perhaps")

    with pytest.raises(PolicyInvalid, match=r"speculation\.max_tokens: 5 is over 4, for which this engine was started"):
        change(replace(FIXED, max_tokens=5))
    change(replace(FIXED, adaptive=True))
    assert _ask(served, sedac_tier="exact")[0] == exact
