"""`sedac ctl policy diff|watch|revisions`, `engine` and `audit` against a real control service."""

from __future__ import annotations

import json
import time

import pytest
from sedac.client.client import ControlClient
from sedac.client.diff import Change, find_changes, find_policy_changes
from sedac.contract import wire
from sedac.policy.model import Checkpoint, Policy, Tier

from testing.control.engines import FIRST
from testing.control.running import RunningServer
from testing.control.watching import watching

SECOND = Policy(enabled=True, checkpoints=(Checkpoint(layer=2, threshold=0.5), Checkpoint(layer=5, threshold=0.75)), default_tier="exact")


def test_changes_are_told_by_layer_and_name_and_not_by_place():
    before = Policy(checkpoints=(Checkpoint(layer=5, threshold=0.25),), tiers=(Tier(name="night"),))
    after = Policy(checkpoints=(Checkpoint(layer=2, threshold=1), Checkpoint(layer=5, threshold=0.25)), tiers=(Tier(name="night", floor="width-25"),))
    changes = {change.field: (change.before, change.after) for change in find_policy_changes(before, after)}
    assert changes == {
        "checkpoints[2].layer": (None, 2),
        "checkpoints[2].threshold": (None, 1),
        "checkpoints[2].weight": (None, 1.0),
        "checkpoints[2].target": (None, 0.5),
        "tiers[night].floor": ("full", "width-25"),
    }
    assert find_policy_changes(after, after) == ()
    assert str(Change("decay", 0.9, 0.8)) == "decay: 0.9 -> 0.8"
    assert find_changes({"a": [1, 2]}, {"a": [1, 2, 3], "b": {}}) == (Change("a", [1, 2], [1, 2, 3]),)


def test_diff_of_revisions_and_of_a_file(ctl, client, tmp_path):
    client.update_policy(FIRST)
    client.update_policy(SECOND)
    client.update_policy(FIRST)
    expected = [
        {"field": "checkpoints[5].threshold", "before": 0.25, "after": 0.75},
        {"field": "default_tier", "before": "balanced", "after": "exact"},
    ]
    assert json.loads(ctl("policy", "diff", "1", "2", "--json").output) == expected
    back = json.loads(ctl("policy", "diff", "2", "--json").output)
    assert back == [{"field": c["field"], "before": c["after"], "after": c["before"]} for c in expected], "to the one in force"
    file = tmp_path / "policy.json"
    file.write_text(ctl("policy", "get", "--revision", "2", "--json").output)
    assert json.loads(ctl("policy", "diff", str(file), "--json").output) == expected, "what applying it would change"
    assert json.loads(ctl("policy", "diff", str(file), "1", "--json").output) == back
    assert "no difference" in ctl("policy", "diff", "1", "3").output
    shown = ctl("policy", "diff", "1", "2").output
    assert "checkpoints[5].threshold" in shown
    assert "0.75" in shown
    assert ctl("policy", "diff", "9").exit_code == 1
    assert ctl("policy", "diff", str(tmp_path / "absent.json")).exit_code == 2


def test_revisions_are_limited_and_a_rollback_waits_for_every_engine(ctl, client, make_engine):
    make_engine().pushes.get(timeout=10)
    for i in range(4):
        client.update_policy(SECOND, comment=f"change {i}")
    assert [r["comment"] for r in json.loads(ctl("policy", "revisions", "--limit", "2", "--json").output)] == ["change 3", "change 2"]
    done = ctl("policy", "rollback", "1", "--wait", "10", "--comment", "back")
    assert done.exit_code == 0, done.output
    assert client.get_status().engines[0].active_revision == 6


@pytest.mark.parametrize("as_json", [True, False])
def test_policy_watch_prints_every_revision_and_what_it_changed(server, as_json):
    with ControlClient(server.address, author="ops") as client:
        for policy, comment in ((FIRST, "first"), (SECOND, "second"), (FIRST, "third")):
            client.update_policy(policy, comment=comment)
    with watching(server, "policy", "watch", "--from-revision", "1", *(["--json"] if as_json else [])) as lines:
        if as_json:
            found = [json.loads(next(lines)) for _ in range(3)]
            assert [(line["revision"], line["comment"]) for line in found] == [("1", "first"), ("2", "second"), ("3", "third")]
        else:
            found = [next(lines).strip() for _ in range(5)]
            assert found[0].startswith("revision 1")
            assert found[1].startswith("revision 2")
            assert found[1].endswith("by ops  second")
            assert found[2:4] == ["checkpoints[5].threshold: 0.25 -> 0.75", "default_tier: balanced -> exact"]


def test_a_watch_goes_on_without_a_gap_over_a_restart_of_the_service(settings):
    running = RunningServer(settings)
    again = settings.model_copy(update={"port": running.server.port})
    with ControlClient(running.address, num_retries=20) as watcher:
        with ControlClient(running.address) as client:
            client.update_policy(FIRST)
        watch = watcher.watch_policy(1)
        assert next(watch).revision == 1
        running.stop()
        running = RunningServer(again)
        try:
            with ControlClient(running.address) as client:
                client.update_policy(SECOND)
                client.update_policy(FIRST)
            assert [next(watch).revision for _ in range(2)] == [2, 3]
        finally:
            watch.close()
            running.stop()


def test_engines_are_listed_with_state_versions_and_refusal(ctl, make_engine, client):
    good, bad = make_engine("e1"), make_engine("e2")
    for engine in (good, bad):
        engine.pushes.get(timeout=10)
    client.wait_until_synced(1, 10)
    bad.refuse = "checkpoints[0].threshold: too low for me"
    assert ctl("policy", "set", "--threshold", "2=0.1", "--wait", "10").exit_code == 3
    deadline = time.monotonic() + 10
    while [e.active_revision for e in client.list_engines()] != [2, 1]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    found = json.loads(ctl("engine", "list", "--json").output)
    assert [(e["engine"]["engine_id"], e["state"]) for e in found] == [("e1", "ENGINE_STATE_SYNCED"), ("e2", "ENGINE_STATE_NACKED")]
    shown = ctl("engine", "list").output
    assert "1 (wanted 2)" in shown
    assert "too low for me" in shown


@pytest.mark.parametrize("as_json", [True, False])
def test_engine_watch_prints_all_then_each_change(server, make_engine, client, as_json):
    make_engine("e1").pushes.get(timeout=10)
    client.wait_until_synced(1, 10)
    with watching(server, "engine", "watch", *(["--json"] if as_json else [])) as lines:
        first = next(lines)
        make_engine("late").pushes.get(timeout=10)
        if as_json:
            assert [(e["engine"]["engine_id"], e["state"]) for e in json.loads(first)["engines"]] == [("e1", "ENGINE_STATE_SYNCED")]
            wanted = ("late", "ENGINE_STATE_SYNCED")
            assert any(wanted in [(e["engine"]["engine_id"], e["state"]) for e in json.loads(line)["engines"]] for line in lines)
        else:
            assert "e1  SYNCED  revision 1" in first
            assert any("late  SYNCED  revision 1" in line for line in lines)


def test_the_audit_log_tells_who_changed_what(ctl, client):
    client.update_policy(FIRST, comment="first")
    assert ctl("policy", "set", "--threshold", "5=0.75", "--comment", "fewer exits").exit_code == 0
    entries = json.loads(ctl("audit", "list", "--json").output)
    assert [(e["action"], e["resource"], e["comment"]) for e in entries] == [
        ("UpdatePolicy", "policies/default", "fewer exits"),
        ("UpdatePolicy", "policies/default", "first"),
    ]
    assert json.loads(entries[0]["after_json"])["checkpoints"][1]["threshold"] == 0.75
    shown = ctl("audit", "list", "--limit", "1").output
    assert "checkpoints[5].threshold: 0.25 -> 0.75" in shown
    assert "first" not in shown


def test_what_is_in_force_is_what_plain_python_says(client):
    client.update_policy(SECOND)
    assert wire.policy_from_proto(client.get_policy()) == SECOND
    assert client.diff_policies(SECOND, 0) == ()
    assert client.diff_policies(FIRST, SECOND) == find_policy_changes(FIRST, SECOND)
