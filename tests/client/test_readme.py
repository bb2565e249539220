"""The README's "Operating it": its commands, its Python and its grpcurl lines, run as they stand against a real control service."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from testing.probe_sets import make_set

_ROOT = Path(__file__).resolve().parents[2]
_ADDRESS = "127.0.0.1:50051"


def _find_blocks() -> list[str]:
    section = (_ROOT / "README.md").read_text().split("\n## Operating it\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```(?:bash|python)\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    return blocks


def test_the_commands_run(server, make_engine, tmp_path):
    make_engine().pushes.get(timeout=10)
    make_set("mine", levels=False).write(tmp_path / "build" / "mine" / "probe-set")
    program = tmp_path / ".venv" / "bin" / "sedac"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\nfrom sedac.app.cli import main\nmain()\n")
    program.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", _find_blocks()[0]],
        cwd=tmp_path,
        env={**os.environ, "SEDAC_CONTROL_ADDRESS": server.address, "COLUMNS": "250"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "became revision 3" in done.stdout
    assert "UpdatePolicy" in done.stdout


def test_the_python_runs(server, make_engine, capsys):
    make_engine().pushes.get(timeout=10)
    code = _find_blocks()[1]
    assert _ADDRESS in code
    exec(compile(code.replace(_ADDRESS, server.address), "README.md", "exec"), {})
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
    answers = [grpcurl(line) for line in _find_blocks()[2].splitlines()]
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
