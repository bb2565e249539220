"""The pages' commands, Python and grpcurl lines, run as they stand against a real control service; cover.py says which."""

from __future__ import annotations

import json
import shlex
import subprocess

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from sedac.app.cli import app
from typer.testing import CliRunner

from testing.probe_sets import make_set
from tests.docs import commands
from tests.docs.cover import BEFORE, CONTROL, GRPCURL, PYTHON, check_output, find_blocks

_ADDRESS = "127.0.0.1:50051"
_LEVELS = ("full", "skip", "contextual-30", "width-20")


def run_here(text: str, **variables: str) -> str:
    """Run commands in this process where they are `sedac`'s, which saves its start, and others by bash; in the working directory."""
    printed = ""
    for command in commands.split(text):
        assert command.end in (";", "&&"), f"{shlex.join(command.words)}: a pipe needs bash"
        if command.words[0].removeprefix(".venv/bin/") == "sedac":
            done = CliRunner().invoke(app, command.words[1:], env={"COLUMNS": "250", **variables, **command.variables}, catch_exceptions=False)
            assert done.exit_code == 0, f"{shlex.join(command.words)}\n{done.output}"
            out, errors = done.stdout, done.stderr
        else:
            ran = subprocess.run(["bash", "-c", shlex.join(command.words)], capture_output=True, text=True, timeout=60, check=True)
            out, errors = ran.stdout, ran.stderr
        if command.output:
            with open(command.output, "a" if command.appends else "w") as file:
                file.write(out)
        printed += out + errors
    return printed


@pytest.mark.parametrize("page", sorted({block.page for block in find_blocks(CONTROL)}))
def test_the_commands_of_a_page_run(page, server, make_engine, tmp_path, monkeypatch):
    make_engine(levels=_LEVELS, draft="adapter", max_draft_tokens=8).pushes.get(timeout=10)
    make_set("mine", levels=False).write(tmp_path / "build" / "mine" / "probe-set")
    monkeypatch.chdir(tmp_path)
    prepared = set()
    for block in find_blocks(CONTROL, page):
        if block.key in BEFORE and block.key not in prepared:
            prepared.add(block.key)
            run_here(BEFORE[block.key], SEDAC_CONTROL_ADDRESS=server.address)
        check_output(block, run_here(block.text, SEDAC_CONTROL_ADDRESS=server.address))
    if page == "docs/operating.md":
        assert "UpdatePolicy" in run_here("sedac ctl audit list --limit 50", SEDAC_CONTROL_ADDRESS=server.address)


def test_the_command_that_makes_every_request_exact_does_so(client, server, make_engine):
    make_engine().pushes.get(timeout=10)
    assert client.get_policy().enabled
    (block,) = (block for block in find_blocks(CONTROL, "docs/operating.md") if block.heading == "Full compute, now")
    run_here(block.text, SEDAC_CONTROL_ADDRESS=server.address)
    assert not client.get_policy().enabled


def test_the_python_runs(server, make_engine, capsys):
    make_engine().pushes.get(timeout=10)
    (block,) = find_blocks(PYTHON)
    assert _ADDRESS in block.text
    exec(compile(block.text.replace(_ADDRESS, server.address), block.page, "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "default_tier: balanced -> exact"
    assert [line.split()[0] for line in printed[1:]] == ["1", "2"]


@pytest.fixture
def grpcurl(server):
    """Do what grpcurl does with a line's arguments: learn the types from the service's reflection, send the JSON, return the answer."""
    channel = grpc.insecure_channel(server.address)
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = DescriptorPool(database)

    def run(line: str):
        words = shlex.split(line)
        assert words[:2] == ["grpcurl", "-plaintext"]
        body, (address, *what) = (words[3], words[4:]) if words[2] == "-d" else ("{}", words[2:])
        assert address == _ADDRESS
        if what == ["list"]:
            return database.get_services()
        if what[0] == "describe":
            return pool.FindMessageTypeByName(what[1])
        service, _, name = what[0].partition("/")
        method = pool.FindServiceByName(service).FindMethodByName(name)
        request = json_format.Parse(body, GetMessageClass(method.input_type)())
        call = channel.unary_stream if method.server_streaming else channel.unary_unary
        stub = call(f"/{what[0]}", lambda message: message.SerializeToString(), GetMessageClass(method.output_type).FromString)
        answer = stub(request, timeout=20)
        if method.server_streaming:
            stream, answer = answer, next(answer)
            stream.cancel()
        return json.loads(json_format.MessageToJson(answer, preserving_proto_field_name=True))

    yield run
    channel.close()


def test_the_grpcurl_lines_are_understood(grpcurl, make_engine):
    make_engine().pushes.get(timeout=10)
    (block,) = find_blocks(GRPCURL)
    answers = [grpcurl(line) for line in block.text.splitlines()]
    listed, described, status, updated, back, watched, started, aborted, audit = answers
    assert {f"sedac.control.v1.{name}" for name in ("Control", "ProbeSets", "Rollouts", "AuditLog")} <= set(listed)
    assert "audit" in described.fields_by_name
    assert status["policy"]["revision"] == "1"
    assert (updated["revision"], updated["comment"], updated.get("enabled", False)) == ("2", "off", False)
    assert (back["revision"], back["enabled"]) == ("3", True)
    assert watched["revision"] == "1"
    assert (started["state"], started["shares"]) == ("ROLLOUT_STATE_PROGRESSING", [0.1])
    assert aborted["state"] == "ROLLOUT_STATE_ABORTED"
    assert [entry["action"] for entry in audit["entries"]][:2] == ["AbortRollout", "StartRollout"]


def test_the_details_of_a_refusal_can_be_read_by_reflection(server):
    with grpc.insecure_channel(server.address) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        for name in ("google.rpc.ErrorInfo", "google.rpc.BadRequest"):
            assert pool.FindMessageTypeByName(name).fields
