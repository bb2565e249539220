"""`sedac ctl` against a real control service: what it prints, and its exit codes."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import threading
import time
from typing import Any

from google.protobuf import json_format
from rich.console import Console
from sedac.contract import wire
from sedac.contract.mapping import write
from sedac.contract.v1 import control_pb2, drafting_pb2
from sedac.ctl import tables
from sedac.ctl.root import app
from sedac.policy.model import Adaptation, Audit, Checkpoint, Policy, Speculation, Tier
from typer.testing import CliRunner

from testing.control.engines import FIRST
from testing.control.running import RunningServer
from testing.figures import make_controller, make_drafting
from testing.strategies import certify


def test_status_shows_policy_and_engines(ctl, make_engine):
    assert "no engine has connected" in ctl("status").output
    make_engine().pushes.get(timeout=5)
    done = ctl("status")
    assert done.exit_code == 0
    assert "2: 0.5  5: 0.25" in done.output
    assert "e1" in done.output
    status = json.loads(ctl("status", "--json").output)
    assert status["engines"][0]["engine"]["checkpoint_layers"] == [2, 5, 8]


def test_set_changes_named_knobs_and_waits(ctl, client, make_engine):
    make_engine().pushes.get(timeout=5)
    done = ctl("policy", "set", "--threshold", "5=0.75", "--threshold", "8=1", "--comment", "why", "--wait", "5")
    assert done.exit_code == 0, done.output
    made = client.get_policy()
    assert [(c.layer, c.threshold) for c in made.checkpoints] == [(2, 0.5), (5, 0.75), (8, 1)]
    assert made.comment == "why"
    assert ctl("policy", "set", "--threshold", "all=0", "--disabled").exit_code == 0
    made = client.get_policy()
    assert ([c.threshold for c in made.checkpoints], made.enabled) == ([0, 0, 0], False)


def test_every_knob_of_a_policy_can_be_set(ctl, client):
    client.update_policy(FIRST)
    done = ctl(
        "policy", "set", "--rule", "accumulate", "--decay", "0.8", "--weight", "2=0.3", "--weight", "5=0.7", "--target", "all=0.6", "--soft-exit",
        "--phase", "all", "--scope", "batch", "--sensitivity", "1.5", "--default-tier", "exact", "--allow-overrides", "--probe-set", "p",
        "--frozen", "--exit-rate", "all=0.3", "--exit-rate", "5=0.4", "--alpha", "0.2", "--warmup-steps", "7", "--window-tokens", "512",
        "--min-threshold", "0.01", "--max-threshold", "9",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert wire.policy_from_proto(client.get_policy()) == Policy(
        enabled=True,
        probe_set="p",
        checkpoints=(Checkpoint(layer=2, threshold=0.5, weight=0.3, target=0.6), Checkpoint(layer=5, threshold=0.25, weight=0.7, target=0.6)),
        phase="all",
        scope="batch",
        rule="accumulate",
        decay=0.8,
        sensitivity=1.5,
        tiers=(Tier(name="balanced", soft_exit=True),),
        default_tier="exact",
        allow_overrides=True,
        adaptation=Adaptation(
            frozen=True, target_exit_rates=(0.3, 0.4), alpha=0.2, warmup_steps=7, window_tokens=512, min_threshold=0.01, max_threshold=9
        ),
    )
    assert "weights" in done.output
    back = ctl("policy", "set", "--rule", "first", "--hard-exit", "--adaptive", "--thawed", "--refuse-overrides", "--sensitivity", "0")
    assert back.exit_code == 0, back.output
    assert "target exit rates 2: 0.3  5: 0.4" in back.output
    made = wire.policy_from_proto(client.get_policy())
    assert (made.rule, made.tiers[0].soft_exit, made.adaptation.enabled, made.adaptation.frozen) == ("first", False, True, False)
    assert made.checkpoints[1].weight == 0.7, "thresholds, weights and targets keep what is not named"
    assert ctl("policy", "set", "--threshold", "5=1").exit_code == 0
    assert wire.policy_from_proto(client.get_policy()).checkpoints[1] == Checkpoint(layer=5, threshold=1, weight=0.7, target=0.6)


def test_knobs_of_layers_that_are_no_checkpoint_are_refused_with_the_remedy(ctl, client):
    client.update_policy(FIRST)
    wrong = ctl("policy", "set", "--weight", "8=1")
    assert wrong.exit_code == 2
    assert "add it with --threshold 8=VALUE" in wrong.output
    assert ctl("adaptation", "set", "--exit-rate", "2=0.5").exit_code == 2
    unknown = ctl("adaptation", "set", "--exit-rate", "all=0.5", "--exit-rate", "8=0.5")
    assert unknown.exit_code == 2
    assert "layer 8 is no checkpoint" in unknown.output
    assert client.get_policy().revision == 1
    assert ctl("policy", "set", "--threshold", "8=1", "--weight", "8=2", "--exit-rate", "all=0.5").exit_code == 0
    assert client.get_policy().checkpoints[2].weight == 2


def test_the_audit_of_a_policy_is_set_guarded_and_left_unguarded(ctl, client):
    client.update_policy(FIRST)
    done = ctl(
        "policy", "set", "--audit-share", "0.01", "--max-mismatch", "0.05", "--max-nll-difference", "0.2", "--audit-confidence", "0.95",
        "--guard", "exact",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "1.0% of the bounded requests; guard: mismatch <= 0.05, NLL difference <= 0.2 at 0.95, else to exact" in done.output
    expected = Audit(share=0.01, max_mismatch=0.05, max_nll_difference=0.2, confidence=0.95, action="exact")
    assert wire.policy_from_proto(client.get_policy()).audit == expected
    assert ctl("policy", "set", "--max-mismatch", "none", "--guard", "rollback").exit_code == 0
    assert wire.policy_from_proto(client.get_policy()).audit == dataclasses.replace(expected, max_mismatch=None, action="rollback")
    assert ctl("policy", "set", "--max-mismatch", "much").exit_code == 2
    refused = ctl("policy", "set", "--audit-share", "2")
    assert refused.exit_code == 1
    assert "audit.share: 2.0 is outside 0..1" in refused.output


def test_self_speculation_is_set_shown_and_put_back(ctl, client, make_engine):
    make_engine(draft="adapter", max_draft_tokens=4).pushes.get(timeout=5)
    assert "on, adaptive: as many tokens as the draft proposes, down to the draft's own confidence, for every tier" in ctl("policy", "get").output
    done = ctl(
        "policy", "set", "--draft-tokens", "3", "--draft-confidence", "0.25", "--draft-fixed", "--draft-tier", "exact", "--draft-tier", "balanced",
        "--wait", "5",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    expected = Speculation(max_tokens=3, min_confidence=0.25, adaptive=False, tiers=("exact", "balanced"))
    assert wire.policy_from_proto(client.get_policy()) == dataclasses.replace(FIRST, speculation=expected)
    assert "on, fixed: up to 3 tokens, down to confidence 0.25, for exact, balanced" in ctl("policy", "get").output
    off = ctl("policy", "set", "--no-speculation")
    assert re.search(r"speculation +off: nothing is drafted", off.output)
    assert wire.policy_from_proto(client.get_policy()).speculation == dataclasses.replace(expected, enabled=False)
    changed = ctl("policy", "diff", "1", "3").output
    for line in (
        "enabled +True +False",
        "max_tokens +0 +3",
        r"min_confidence +- +0.25",
        "adaptive +True +False",
        r"tiers +\[\] +\['exact', 'balanced'\]",
    ):
        assert re.search(rf"speculation\.{line}", changed), changed
    back = ctl(
        "policy", "set", "--speculation", "--draft-tokens", "0", "--draft-confidence", "own", "--draft-adaptive", "--draft-tier", ""
    )  # fmt: skip
    assert back.exit_code == 0, back.output
    assert wire.policy_from_proto(client.get_policy()) == FIRST
    assert "no difference" in ctl("policy", "diff", "1", "4").output


def test_knobs_of_self_speculation_are_refused_with_the_remedy(ctl, client, make_engine):
    make_engine(draft="adapter", max_draft_tokens=4).pushes.get(timeout=5)
    for option, value, words in (
        ("--draft-tokens", "5", "speculation.max_tokens: 5 is over 4, for which this engine was started; give less, or restart it"),
        ("--draft-tokens", "17", "speculation.max_tokens: 17 is outside 0..16"),
        ("--draft-confidence", "1.5", "speculation.min_confidence: 1.5 is outside 0..1"),
        ("--draft-tier", "night", "speculation.tiers[0]: 'night' is no tier of this policy, it has exact, balanced"),
    ):
        refused = ctl("policy", "set", option, value)
        assert refused.exit_code == 1, refused.output
        assert words in refused.stderr
    assert ctl("policy", "set", "--draft-confidence", "none").exit_code == 2
    assert client.get_policy().revision == 1
    assert ctl("policy", "set", "--draft-tier", "balanced").exit_code == 0
    ctl("tier", "set", "night")
    assert ctl("tier", "default", "exact").exit_code == 0
    kept = ctl("tier", "remove", "balanced")
    assert kept.exit_code == 1
    assert "speculation.tiers[0]: 'balanced' is no tier of this policy, it has exact, night; name one of them, or none for all" in kept.stderr


def test_a_policy_file_of_before_speculation_is_applied(ctl, client):
    client.update_policy(dataclasses.replace(FIRST, speculation=Speculation(enabled=False)))
    known = json.loads(ctl("policy", "get", "--json").output)
    del known["speculation"], known["etag"]
    assert ctl("policy", "apply", "-", stdin=json.dumps(known)).exit_code == 0
    assert wire.policy_from_proto(client.get_policy()) == FIRST


def test_speculation_leaves_the_certificate_alone(ctl, client, make_engine, tmp_path):
    make_engine().pushes.get(timeout=5)
    assert ctl("policy", "apply", _write(tmp_path / "policy.json", certify(FIRST))).exit_code == 0
    done = ctl("policy", "set", "--no-speculation", "--draft-tokens", "2", "--draft-confidence", "0.5", "--draft-fixed", "--draft-tier", "exact")
    assert "CERTIFIED  balanced certified" in done.output
    assert "UNCERTIFIED" not in done.output + ctl("status").output
    assert client.get_policy().HasField("certificate")


def test_tiers_are_listed_set_removed_and_chosen(ctl, client, make_engine):
    make_engine(levels=["full", "skip", "width-25"]).pushes.get(timeout=5)
    done = ctl("tier", "set", "night", "--floor", "width-25", "--threshold-scale", "0", "--wait", "5", "--comment", "cheap")
    assert done.exit_code == 0, done.output
    expected = (Tier(name="balanced"), Tier(name="night", floor="width-25", threshold_scale=0.0))
    assert wire.policy_from_proto(client.get_policy()).tiers == expected, "the implied tier stays beside the first one named"
    assert ctl("tier", "set", "night", "--level", "full").exit_code == 0
    assert wire.policy_from_proto(client.get_policy()).tiers[1] == Tier(name="night", floor="width-25", level="full", threshold_scale=0.0)
    assert ctl("tier", "default", "night").exit_code == 0
    listed = ctl("tier", "list").output
    assert re.search(r"night +width-25 +full +x 0 +hard +default", listed)
    assert "levels of e1: full, skip, width-25" in listed
    assert [tier["name"] for tier in json.loads(ctl("tier", "list", "--json").output)] == ["balanced", "night"]
    kept = ctl("tier", "remove", "night")
    assert kept.exit_code == 2
    assert "is the default tier; choose another one first" in kept.output
    assert ctl("tier", "default", "exact").exit_code == 0
    assert ctl("tier", "remove", "balanced").exit_code == 0
    assert [tier.name for tier in client.get_policy().tiers] == ["night"]
    assert "the last tier can't be removed" in ctl("tier", "remove", "night").output
    assert "it has night" in ctl("tier", "remove", "day").output
    assert ctl("tier", "set", "exact").exit_code == 2
    unknown = ctl("tier", "set", "day", "--level", "width-99")
    assert unknown.exit_code == 1
    assert "it has full, skip, width-25" in unknown.output
    assert "default_tier: 'day' is no tier" in ctl("tier", "default", "day").output


def test_adaptation_is_set_frozen_thawed_and_reset(ctl, client):
    client.update_policy(FIRST)
    assert ctl("adaptation", "set").exit_code == 2
    assert ctl("adaptation", "set", "--adaptive", "--exit-rate", "all=0.3").exit_code == 0

    def get() -> Adaptation:
        return wire.policy_from_proto(client.get_policy()).adaptation

    assert get() == Adaptation(enabled=True, target_exit_rates=(0.3, 0.3))
    assert ctl("adaptation", "freeze", "--comment", "night").exit_code == 0
    assert get().frozen
    assert client.get_policy().comment == "night"
    assert "frozen, target exit rates 2: 0.3" in ctl("adaptation", "show").output
    assert ctl("adaptation", "thaw").exit_code == 0
    assert ctl("adaptation", "reset").exit_code == 0
    assert ctl("adaptation", "reset").exit_code == 0
    assert ctl("adaptation", "set", "--exit-rate", "5=0.1", "--alpha", "0.5").exit_code == 0
    assert get() == Adaptation(enabled=True, target_exit_rates=(0.3, 0.1), alpha=0.5, generation=2)
    refused = ctl("adaptation", "set", "--alpha", "2")
    assert refused.exit_code == 1
    assert "adaptation.alpha: 2.0 is outside (0, 1]" in refused.output
    assert ctl("adaptation", "set", "--fixed").exit_code == 0
    assert "off" in ctl("adaptation", "show").output


def test_help_teaches(ctl):
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", ctl("policy", "set", "--help").output).split())
    for words in ("a new LAYER adds one", "confidence adds up", "makes reducing opt-in", "averages about ten steps", "share of the tokens evaluated"):
        assert words in text
    for command in (["tier"], ["tier", "set"], ["adaptation"], ["adaptation", "set"], []):
        assert ctl(*command, "--help").exit_code == 0


def test_exit_codes_tell_what_went_wrong(ctl, client, make_engine):
    client.update_policy(FIRST)
    refused = ctl("policy", "set", "--threshold", "5=-1")
    assert refused.exit_code == 1
    assert "checkpoints[1].threshold: -1.0 is not a finite number" in refused.output
    assert ctl("policy", "set").exit_code == 2
    assert ctl("policy", "set", "--threshold", "five=1").exit_code == 2
    not_synced = ctl("policy", "set", "--enabled", "--wait", "0.2")
    assert not_synced.exit_code == 3
    assert "no engine is connected" in not_synced.output
    unreachable = CliRunner().invoke(app, ["status", "--address", "127.0.0.1:1"])
    assert unreachable.exit_code == 4
    assert "is it running?" in unreachable.output


def test_apply_takes_what_get_prints(ctl, client):
    client.update_policy(FIRST)
    text = ctl("policy", "get", "--json").output
    changed = text.replace("0.25", "0.125")
    assert ctl("policy", "apply", "-", "--validate-only", stdin=changed).exit_code == 0
    assert client.get_policy().revision == 1
    assert ctl("policy", "apply", "-", stdin=changed).exit_code == 0
    assert client.get_policy().checkpoints[1].threshold == 0.125
    stale = ctl("policy", "apply", "-", stdin=changed)
    assert stale.exit_code == 1, "the etag in the file guards against other writers"
    assert "is not the one in force" in stale.output
    assert ctl("policy", "apply", "-", stdin=re.sub('"etag": ".*",', "", changed)).exit_code == 0
    assert ctl("policy", "apply", "-", stdin='{"speed": 1}').exit_code == 2
    assert ctl("policy", "rollback", "1").exit_code == 0
    assert "rollback to revision 1" in ctl("policy", "revisions").output


def _write(path, policy: Policy) -> str:
    path.write_text(json_format.MessageToJson(wire.policy_to_proto(policy), preserving_proto_field_name=True))
    return str(path)


def test_a_certified_file_is_applied_where_it_fits_and_shown(ctl, client, make_engine, tmp_path):
    make_engine().pushes.get(timeout=5)
    assert "UNCERTIFIED" in ctl("status").output
    done = ctl("policy", "apply", _write(tmp_path / "policy.json", certify(FIRST)), "--wait", "5")
    assert done.exit_code == 0, done.output
    line = "CERTIFIED  balanced certified: mismatch <= 0.05 at 95 %, 500 requests, 2026-11-21"
    for command in (["status"], ["policy", "get"]):
        assert line in ctl(*command).output
    assert json.loads(ctl("status", "--json").output)["certification"] == "CERTIFICATION_CERTIFIED"
    assert re.search(r"balanced +balanced", ctl("policy", "revisions").output), "default tier, certified tier"
    assert ctl("policy", "apply", "-", stdin=ctl("policy", "get", "--json").output).exit_code == 0, "what get prints is applied as it is"
    assert client.get_policy().HasField("certificate")
    assert "UNCERTIFIED" in ctl("policy", "set", "--threshold", "2=0.6").output
    assert json.loads(ctl("status", "--json").output)["certification"] == "CERTIFICATION_UNCERTIFIED"


def test_a_foreign_certificate_is_refused_unless_forced(ctl, client, make_engine, tmp_path):
    make_engine().pushes.get(timeout=5)
    foreign = _write(tmp_path / "policy.json", certify(FIRST, weights="a" * 64, probe_set="b" * 64))
    refused = ctl("policy", "apply", foreign)
    assert refused.exit_code == 1
    lines = refused.stderr.splitlines()
    assert lines[0] == "sedac: policy refused:"
    remedy = "certify again on this model with `sedac-probes certify`, or leave the certificate out with `sedac ctl policy apply --force` (engine e1)"
    assert lines[2] == f"  certificate.weights_sha256: aaaaaaaaaaaa..., the engine has 111111111111...; {remedy}"
    assert lines[1] == f"  certificate.probe_set_sha256: bbbbbbbbbbbb..., the engine has 222222222222...; {remedy}"
    assert client.get_policy().revision == 1
    forced = ctl("policy", "apply", foreign, "--force", "--wait", "5")
    assert forced.exit_code == 0, forced.output
    assert "applied UNCERTIFIED, without the file's certificate (balanced certified: mismatch <= 0.05" in forced.stderr
    assert wire.policy_from_proto(client.get_policy()) == FIRST


def test_apply_names_a_file_that_is_not_there(ctl, tmp_path):
    done = ctl("policy", "apply", str(tmp_path / "absent.json"))
    assert done.exit_code == 2
    assert "No such file" in done.output
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert ctl("policy", "apply", str(tmp_path / "binary")).exit_code == 2


def test_texts_of_others_are_printed_as_they_are(ctl, client, make_engine):
    make_engine("[/red]e1").pushes.get(timeout=5)
    client.update_policy(Policy(), comment="[/] [bold]x")
    for command in (["status"], ["policy", "get"], ["policy", "revisions"]):
        done = ctl(*command)
        assert done.exit_code == 0, done.exception
        assert "[/] [bold]x" in done.output
    assert "[/red]e1" in ctl("status").output


def test_a_refusal_is_shown_with_the_engine_and_its_reason(ctl, make_engine):
    engine = make_engine()
    engine.pushes.get(timeout=5)
    engine.refuse = "checkpoints[0].threshold: too low for me"
    done = ctl("policy", "set", "--threshold", "2=0.1", "--wait", "5")
    assert done.exit_code == 3
    assert "engine e1 refused revision 2: checkpoints[0].threshold: too low for me" in done.stderr
    shown = ctl("status").output
    assert "NACKED" in shown
    assert "1 (wanted 2)" in shown
    assert "too low for me" in shown


def test_watch_prints_json_lines_until_the_service_is_gone(settings):
    running = RunningServer(settings)
    stopping = threading.Timer(1.0, running.stop)
    stopping.start()
    done = CliRunner().invoke(app, ["watch", "--json", "--interval", "0.1", "--address", running.address])
    stopping.join()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) >= 3
    assert all(line["engines"] == [] for line in lines)
    assert done.exit_code == 4
    assert "is stopping" in done.stderr


def _make_report(*, steps: int, allowed: int, exited: int, skipped: int) -> control_pb2.Status:
    report = control_pb2.EngineReport(
        num_steps=steps,
        num_decode_tokens=allowed,
        num_mlp_blocks_skipped=skipped,
        num_mlp_blocks_computed=10 * allowed - skipped,
        checkpoints=[control_pb2.CheckpointReport(layer=2, num_exited=exited)],
    )
    return control_pb2.Status(engines=[control_pb2.EngineStatus(engine=control_pb2.EngineHello(engine_id="e1"), report=report)])


def _render(*statuses: control_pb2.Status) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(tables.make_status(*statuses))
    return console.export_text()


def test_rates_are_of_the_time_since_the_earlier_status():
    before, now = _make_report(steps=10, allowed=100, exited=100, skipped=500), _make_report(steps=20, allowed=200, exited=125, skipped=510)
    assert "2: 62.5%" in _render(now)
    assert "25.5%" in _render(now)
    assert "2: 25.0%" in _render(now, before)
    assert "1.0%" in _render(now, before)
    restarted = _make_report(steps=5, allowed=50, exited=5, skipped=0)
    assert "2: 10.0%" in _render(restarted, now), "an engine that started again counts from 0"
    assert "%" not in _render(now, now), "no token, no rate"


def _make_tier_report(*, steps: int, tokens: int, blocks: float, exited: int) -> control_pb2.Status:
    report = control_pb2.EngineReport(
        num_steps=steps,
        checkpoints=[control_pb2.CheckpointReport(layer=2, num_evaluated=9, num_exited=4, threshold=0.375, exit_rate=0.25)],
        tiers=[control_pb2.TierReport(name="night", num_tokens=tokens, num_exited=exited, num_mlp_blocks_computed=blocks)],
        num_adaptations=7,
    )
    policy = Policy(checkpoints=(Checkpoint(layer=2, threshold=0.5),), adaptation=Adaptation(enabled=True, target_exit_rates=(0.2,)))
    engine = control_pb2.EngineStatus(engine=control_pb2.EngineHello(engine_id="e1", num_layers=10), report=report)
    return control_pb2.Status(policy=wire.policy_to_proto(policy), engines=[engine])


def test_status_shows_what_tiers_cost_and_thresholds_in_force():
    before, now = (
        _make_tier_report(steps=1, tokens=100, blocks=1000, exited=0),
        _make_tier_report(steps=2, tokens=200, blocks=1650.5, exited=50),
    )
    assert re.search(r"e1 +night +200 +82.5% +25.0%", _render(now))
    assert re.search(r"e1 +night +100 +65.0% +50.0%", _render(now, before))
    assert re.search(r"e1 +2 +0.375 +0.5 +25.0% +20.0% +9 +4", _render(now))
    assert re.search(r"e1 +night +0 +- +-", _render(now, now))


def _make_drafting_status(steps: int, *generated: tuple[int, int], **state: Any) -> control_pb2.Status:
    controller = (make_controller(1, **state), make_controller(4, "measuring", 0.0))
    drafting = write(make_drafting(*generated, controller=controller), drafting_pb2.Drafting())
    engine = control_pb2.EngineStatus(
        engine=control_pb2.EngineHello(engine_id="e1"), report=control_pb2.EngineReport(num_steps=steps, drafting=drafting)
    )
    alone = control_pb2.EngineStatus(engine=control_pb2.EngineHello(engine_id="e2"), report=control_pb2.EngineReport(num_steps=1))
    return control_pb2.Status(engines=[engine, alone])


def test_status_shows_how_engines_draft_since_the_start_and_of_late():
    before = _make_drafting_status(2, (3, 3), (3, 3))
    now = _make_drafting_status(6, (3, 3), (3, 3), (0, 0), (2, 0), (3, 1), (3, 1), state="paused", gain=0.91)
    title, first, second = _render(now).split("tokens/step")[1].splitlines()[:3]
    assert re.search(r"e1 +adapter +57.1% +57.1% +2.33 +2.80 +80% 40% 50% +29.2% +1: paused 0.91x", first)
    assert second.strip() == "4: measuring", "no gain is known yet"
    assert "controller by batch size" in title
    assert "e2" not in second
    late = _render(now, before)
    assert re.search(r"e1 +adapter +25.0% +33.3% +1.50 +2.67 +67% 0% 0% +25.0% +1: paused 0.91x", late)
    assert re.search(r"e1 +adapter +25.0% ", _render(_make_drafting_status(1, (2, 0), (2, 1)), now)), "an engine that started again counts from 0"
    assert re.search(r"e1 +adapter +- +- +- +- +- +- +1: drafting 1.25x", _render(_make_drafting_status(1)))
    assert "tokens/step" not in _render(control_pb2.Status(engines=[now.engines[1]])), "no draft, no table"


def test_engine_list_and_json_tell_how_an_engine_drafts(ctl, client, make_engine):
    engine = make_engine()
    engine.pushes.get(timeout=5)
    assert re.search(r"e1 .* demo +- +1 ", ctl("engine", "list").output)
    for drafting, shown in ((make_drafting(), r"adapter "), (make_drafting((3, 1), (1, 1)), r"adapter: AR 50.0%, 2.00 tokens/step")):
        report = control_pb2.EngineReport(num_steps=len(shown), drafting=write(drafting, drafting_pb2.Drafting()))
        engine.send(control_pb2.EngineMessage(report=report))
        deadline = time.monotonic() + 5
        while client.get_status().engines[0].report != report and time.monotonic() < deadline:
            time.sleep(0.01)
        assert re.search(shown, ctl("engine", "list").output)
    (listed,) = json.loads(ctl("status", "--json").output)["engines"]
    assert (listed["report"]["drafting"]["kind"], listed["report"]["drafting"]["num_accepted"]) == ("adapter", "2")
