"""`sedac ctl` against a real control service: what it prints, and its exit codes."""

from __future__ import annotations

import json

import pytest
from sedac.client.ctl import app
from typer.testing import CliRunner

from tests.control.conftest import FIRST, client, make_engine, server, settings  # noqa: F401  fixtures


@pytest.fixture
def ctl(server):  # noqa: F811
    def run(*arguments: str, stdin: str | None = None):
        return CliRunner().invoke(app, list(arguments), env={"SEDAC_CONTROL_ADDRESS": server.address, "COLUMNS": "200"}, input=stdin)

    return run


def test_status_shows_policy_and_engines(ctl, make_engine):  # noqa: F811
    assert "no engine has connected" in ctl("status").output
    make_engine().pushes.get(timeout=5)
    done = ctl("status")
    assert done.exit_code == 0
    assert "2: 0.5  5: 0.25" in done.output
    assert "e1" in done.output
    status = json.loads(ctl("status", "--json").output)
    assert status["engines"][0]["engine"]["checkpoint_layers"] == [2, 5, 8]


def test_set_changes_named_knobs_and_waits(ctl, client, make_engine):  # noqa: F811
    make_engine().pushes.get(timeout=5)
    done = ctl("policy", "set", "--threshold", "5=0.75", "--threshold", "8=1", "--comment", "why", "--wait", "5")
    assert done.exit_code == 0, done.output
    made = client.get_policy()
    assert [(c.layer, c.threshold) for c in made.checkpoints] == [(2, 0.5), (5, 0.75), (8, 1)]
    assert made.comment == "why"
    assert ctl("policy", "set", "--threshold", "all=0", "--disabled").exit_code == 0
    made = client.get_policy()
    assert ([c.threshold for c in made.checkpoints], made.enabled) == ([0, 0, 0], False)


def test_exit_codes_tell_what_went_wrong(ctl, client, make_engine):  # noqa: F811
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


def test_apply_takes_what_get_prints(ctl, client):  # noqa: F811
    client.update_policy(FIRST)
    text = ctl("policy", "get", "--json").output
    changed = text.replace("0.25", "0.125")
    assert ctl("policy", "apply", "-", "--validate-only", stdin=changed).exit_code == 0
    assert client.get_policy().revision == 1
    assert ctl("policy", "apply", "-", stdin=changed).exit_code == 0
    assert client.get_policy().checkpoints[1].threshold == 0.125
    assert ctl("policy", "apply", "-", stdin='{"speed": 1}').exit_code == 2
    assert ctl("policy", "rollback", "1").exit_code == 0
    assert "rollback to revision 1" in ctl("policy", "revisions").output
