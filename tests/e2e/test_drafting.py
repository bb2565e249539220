"""An own draft through the server: its figures on /metrics, in the status and in `sedac ctl` are one and the same, and vLLM's own counts."""

from __future__ import annotations

import json
import math
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.ctl.root import app
from sedac.probe.draft import save_draft
from sedac.probe.draft_manifest import REDUCED, DraftManifest
from typer.testing import CliRunner

from testing.served import Served, start, stop

pytestmark = pytest.mark.e2e

DRAFT = DraftManifest(name="halves", kind=REDUCED, model="sedac-demo", hidden_size=256, num_layers=12, depth=12, level="contextual-50", max_tokens=4)
PROMPTS = [f"def {name}(self, size):\n    " for name in ("read", "write", "seek", "close")]


def _read(served: Served, **wanted: str) -> dict[str, float]:
    """Samples that carry these labels, by name; those by position or bucket with it in braces."""
    with urllib.request.urlopen(f"{served.url}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    found = {}
    for sample in (sample for family in families for sample in family.samples if sample.name.startswith(("sedac_", "vllm:"))):
        if all(sample.labels.get(name) == value for name, value in wanted.items()):
            more = [sample.labels[name] for name in ("position", "le", "sequences", "state", "part") if name in sample.labels]
            found[sample.name + (f"{{{','.join(more)}}}" if more else "")] = sample.value
    return found


def test_all_figures_of_a_draft_agree(tmp_path):
    save_draft(tmp_path / "draft", DRAFT, None)
    served = start(tmp_path, "--dtype", "float32", SEDAC_DRAFT_DIR=str(tmp_path / "draft"))
    try:
        before = _read(served)
        assert before["sedac_draft_tokens_total"] == 0, "there before the first request"
        assert math.isnan(before["sedac_draft_acceptance_rate"])
        served.make_openai().completions.create(model="sedac-demo", prompt=PROMPTS[0], max_tokens=96, temperature=0, extra_body={"ignore_eos": True})
        served.make_openai().completions.create(model="sedac-demo", prompt=PROMPTS, max_tokens=48, temperature=0.8, extra_body={"ignore_eos": True})
        time.sleep(1.5)  # the agent reads every 0.25 s
        vllm, ours = _read(served), _read(served, kind="reduced")
        drafted, accepted = ours["sedac_draft_tokens_total"], ours["sedac_draft_accepted_tokens_total"]
        assert 0 < accepted <= drafted
        assert (drafted, accepted) == (vllm["vllm:spec_decode_num_draft_tokens_total"], vllm["vllm:spec_decode_num_accepted_tokens_total"])
        for position in range(DRAFT.max_tokens):
            assert ours[f"sedac_draft_accepted_at_total{{{position}}}"] == vllm[f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{{position}}}"]
        count, plain = ours["sedac_draft_length_count"], ours["sedac_draft_length_bucket{0.0}"]
        assert count - plain == vllm["vllm:spec_decode_num_drafts_total"]
        assert ours["sedac_draft_length_sum"] == drafted
        assert count + accepted == vllm["vllm:generation_tokens_total"] == 96 + 4 * 48
        assert math.isclose(vllm["sedac_draft_acceptance_rate"], accepted / drafted)
        assert math.isclose(vllm["sedac_draft_token_ratio"], accepted / (96 + 4 * 48))
        assert 0 < ours["sedac_draft_seconds_total"] < ours["sedac_step_seconds_total"]
        assert drafted / 4 <= ours["sedac_draft_passes_total"] <= drafted
        for size in ("1", "4"):
            assert sum(value for name, value in ours.items() if name.startswith(f"sedac_draft_controller_state{{{size},")) == 1
            assert 0 < ours[f"sedac_draft_controller_seconds{{{size},plain}}"] < 5
        assert ours["sedac_draft_controller_gain{1}"] > 0

        with urllib.request.urlopen(f"{served.url}/sedac/status", timeout=30) as answer:
            status = json.load(answer)
        assert math.isclose(status["drafting"]["tokens_per_step"], 1 + accepted / count)
        time.sleep(1.5)  # the agent reports every half second
        with ControlClient(served.control_address) as client:
            (engine,) = client.get_status().engines
        assert wire.drafting_from_proto(engine.report.drafting).get_rates() == pytest.approx(status["drafting"])
        environment = {"SEDAC_CONTROL_ADDRESS": served.control_address, "COLUMNS": "250"}
        assert f"{accepted / drafted:.1%}" in CliRunner().invoke(app, ["status"], env=environment).output
        listed = CliRunner().invoke(app, ["engine", "list"], env=environment).output
        assert f"reduced: AR {accepted / drafted:.1%}, {1 + accepted / count:.2f} tokens/step" in listed
        print(listed, CliRunner().invoke(app, ["status"], env=environment).output)
    finally:
        assert stop(served) == 0, served.log.read_text()[-4000:]
