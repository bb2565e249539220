"""`sedac ctl` against a real control service: what it prints, and its exit codes."""

from __future__ import annotations

import io
import json
import re
import threading

import pytest
from rich.console import Console
from sedac.client import tables
from sedac.client.ctl import app
from sedac.control.v1 import control_pb2
from sedac.policy import Policy
from typer.testing import CliRunner

from tests.control.conftest import FIRST, RunningServer


@pytest.fixture
def ctl(server):
    def run(*arguments: str, stdin: str | None = None):
        return CliRunner().invoke(app, list(arguments), env={"SEDAC_CONTROL_ADDRESS": server.address, "COLUMNS": "200"}, input=stdin)

    return run


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
