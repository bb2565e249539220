"""Speculation through the server: exact stays greedy, and the draft ratios on /metrics are vLLM's own counts."""

from __future__ import annotations

import math
import re
import time
import urllib.request

import pytest

from testing.served import start, stop

pytestmark = pytest.mark.e2e

PROMPT = "".join(f"    def get_{name}(self):\n        return self._{name}\n\n" for name in ("host", "port", "path", "query"))


def _read_counter(served, name: str) -> float:
    with urllib.request.urlopen(f"{served.url}/metrics", timeout=30) as answer:
        return float(re.search(rf"^vllm:{name}_total{{.*}} (\S+)$", answer.read().decode(), re.MULTILINE)[1])


def _complete(served, tier: str) -> str:
    ask = {"model": "sedac-demo", "prompt": PROMPT, "max_tokens": 96, "temperature": 0}
    return served.make_openai().completions.create(**ask, extra_body={"ignore_eos": True, "vllm_xargs": {"sedac_tier": tier}}).choices[0].text


def test_exact_stays_greedy_and_the_draft_ratios_are_shown(tmp_path):
    drafts = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4}'
    texts = {}
    for name, arguments in (("plain", ("--draft", "none")), ("ngram", ("--speculative-config", drafts))):
        directory = tmp_path / name
        directory.mkdir()
        served = start(directory, "--dtype", "float32", *arguments)
        try:
            texts[name] = _complete(served, "exact")
            metrics = served.read_metrics()
            if name == "plain":
                assert "sedac_draft_acceptance_rate" not in metrics
                continue
            _complete(served, "aggressive")
            time.sleep(1.5)  # the agent reads every 0.25 s
            proposed, accepted = (_read_counter(served, f"spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted"))
            generated = _read_counter(served, "generation_tokens")
            metrics = served.read_metrics()
            print(f"AR {accepted:.0f} / {proposed:.0f}, TRR {accepted:.0f} / {generated:.0f}")
            assert 0 < accepted <= proposed
            assert math.isclose(metrics["sedac_draft_acceptance_rate"], accepted / proposed)
            assert math.isclose(metrics["sedac_draft_token_ratio"], accepted / generated)
            assert metrics["sedac_tier_tokens_total{aggressive}"] > 96
        finally:
            stop(served)
    assert texts["ngram"] == texts["plain"]
