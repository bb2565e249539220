"""Tab completion through the protocol of typer's own shell scripts: commands, options, and live values of a real control service."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time

import pytest
from sedac.app.cli import app
from sedac.policy.model import Policy, Tier
from typer.testing import CliRunner

from testing.control.engines import FIRST
from testing.probe_sets import make_set


def _complete(line: str, address: str = "127.0.0.1:1", shell: str = "fish", **env: str) -> dict[str, str]:
    """Return what the shell would offer at the end of a line, with its explanations."""
    variables = {"_SEDAC_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = CliRunner().invoke(app, [], prog_name="sedac", env={**variables, "SEDAC_CONTROL_ADDRESS": address, "COLUMNS": "250", **env})
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return {word: note for word, _, note in (row.partition("\t") for row in done.stdout.splitlines() if row)}


@pytest.fixture
def complete(server):
    return lambda line, **env: _complete(line, server.address, **env)


def test_commands_and_options_complete_without_a_service():
    assert {"policy", "rollout", "probe-set", "engine", "audit", "status"} <= set(_complete("sedac ctl "))
    assert {"get", "set", "apply", "revisions", "rollback", "diff", "watch"} == set(_complete("sedac ctl policy "))
    assert set(_complete("sedac ctl policy set --max-")) == {"--max-mismatch", "--max-nll-difference", "--max-threshold"}
    assert set(_complete("sedac ctl status --to")) == {"--token-file"}
    assert set(_complete("sedac ctl policy set --guard ")) == {"rollback", "exact"}
    options = {"--draft-tokens", "--draft-confidence", "--draft-adaptive", "--draft-fixed", "--draft-tier"}
    assert set(_complete("sedac ctl policy set --draft-")) == options


def test_revisions_complete_with_their_comments(complete, client):
    client.update_policy(FIRST, comment="first")
    client.update_policy(Policy(), comment="all off")
    assert complete("sedac ctl policy rollback ") == {"2": "tester: all off", "1": "tester: first"}
    assert complete("sedac ctl policy diff 1 ") == {"2": "tester: all off", "1": "tester: first"}
    assert set(complete("sedac ctl policy get --revision 1")) == {"1"}
    assert set(complete("sedac ctl rollout start --revision ")) == {"1", "2"}


def test_comments_of_others_disturb_no_shell(complete, client):
    client.update_policy(FIRST, comment="[/] [bold]two\nlines and " + "x" * 100)
    ((revision, note),) = complete("sedac ctl policy rollback ").items()
    assert revision == "1"
    assert note.startswith("tester: [/] [bold]two lines and xxx")
    assert len(note) == 60


def test_tiers_probe_sets_and_roll_outs_complete_by_name(complete, client, make_engine, tmp_path):
    make_engine("e1", initial=Policy(enabled=True, tiers=(Tier(name="night"), Tier(name="noon")), default_tier="noon")).pushes.get(timeout=10)
    assert set(complete("sedac ctl tier default n")) == {"night", "noon"}
    assert complete("sedac ctl policy set --default-tier e") == {"exact": "plain vLLM"}
    assert set(complete("sedac ctl policy set --draft-tier ")) == {"exact", "night", "noon"}
    client.upload_probe_set(make_set("fresh").write(tmp_path / "set"))
    for line in ("sedac ctl probe-set show ", "sedac ctl probe-set delete f", "sedac ctl policy set --probe-set "):
        assert complete(line) == {"fresh": "tiny, rank 4"}
    client.start_rollout(FIRST, comment="wider", interval_seconds=3600)
    assert complete("sedac ctl rollout abort ") == {"1": "PROGRESSING wider"}


def test_the_address_on_the_line_counts(server, client):
    client.update_policy(FIRST, comment="first")
    assert set(_complete(f"sedac ctl policy rollback --address {server.address} ")) == {"1"}


@pytest.mark.parametrize("command", ["policy rollback ", "tier default ", "probe-set show ", "rollout show ", "policy set --probe-set "])
def test_a_service_that_is_away_completes_nothing_and_says_nothing(command):
    started = time.monotonic()
    assert _complete(f"sedac ctl {command}") == {}
    assert time.monotonic() - started < 10, "the shell must not be held up; one second is the limit of a call"


def test_credentials_that_do_not_fit_are_no_noise_either(complete, tmp_path):
    assert complete("sedac ctl policy rollback ", SEDAC_CONTROL_TOKEN_FILE=str(tmp_path / "absent")) == {}


def test_bash_gets_its_words(server, client):
    client.update_policy(FIRST, comment="first")
    code = "import sys; sys.argv = ['sedac']; from sedac.app.cli import main; main()"
    words = "sedac ctl policy rollback "
    env = {"_SEDAC_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(shlex.split(words)))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env, "SEDAC_CONTROL_ADDRESS": server.address}, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("1\n", "")
