"""Real processes are frozen, thawed and stopped with all that they started, whatever ends the run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from sedac.bench.plans import Plan, find_free_port, plan_server
from sedac.bench.reading import make_matrix
from sedac.bench.servers import Server, Servers, stop_all
from sedac.errors import BenchmarkFailed

from testing.counting import make_plan


def is_counting(path: Path) -> bool:
    """Whether the number grows within a while that is long enough for a busy machine, or stands still for one."""
    before = path.read_text() if path.exists() else ""
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if path.exists() and path.read_text() not in ("", before):
            return True
    return False


def wait_until_counting(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not is_counting(path):
        assert time.monotonic() < deadline


def find_living(pids: list[int]) -> list[int]:
    """Which processes live; what has ended may wait to be taken away by init."""
    living = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            living += [pid] if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else []
    return living


def find_states(server: Server) -> set[str]:
    return {process.status() for process in server.find_processes()}


@pytest.fixture
def servers(tmp_path) -> Iterator[Servers]:
    with Servers(tmp_path / "logs") as running:
        yield running


def test_one_server_works_while_all_others_stand_still(servers, tmp_path):
    paths = [tmp_path / name for name in "abc"]
    started = {path.name: servers.start(make_plan(path)) for path in paths}
    assert all(server.ready_seconds > 0 for server in started.values())
    for name in ("a", "b", "c", "a"):
        servers.use(name)
        wait_until_counting(tmp_path / name)
        others = [path for path in paths if path.name != name]
        assert [path.name for path in others if is_counting(path)] == []
        assert all(find_states(started[path.name]) == {psutil.STATUS_STOPPED} for path in others)
    servers.use("")
    assert not any(map(is_counting, paths))


def test_leaving_the_context_stops_frozen_servers_and_their_children(tmp_path):
    with Servers(tmp_path / "logs") as servers:
        started = [servers.start(make_plan(tmp_path / name)) for name in "ab"]
        pids = [process.pid for server in started for process in server.find_processes()]
        servers.use("a")
        own = servers.make_directory("a")
    assert len(pids) == 4
    assert find_living(pids) == []
    assert not own.exists()


def test_a_child_that_left_the_group_is_frozen_and_stopped_too(tmp_path):
    with Servers(tmp_path / "logs") as servers:
        server = servers.start(make_plan(tmp_path / "away", "--away"))
        wait_until_counting(tmp_path / "away")
        pids = [process.pid for process in server.find_processes()]
        assert len(pids) == 2
        servers.use("")
        assert not is_counting(tmp_path / "away")
    assert find_living(pids) == []


def test_what_does_not_end_in_time_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("sedac.bench.servers._STOP_SECONDS", 1.0)
    server = Server.start(make_plan(tmp_path / "stubborn", "--stubborn"), tmp_path / "log")
    server.wait_until_ready(60)
    wait_until_counting(tmp_path / "stubborn")
    pids = [process.pid for process in server.find_processes()]
    server.freeze()
    stop_all([server])
    assert find_living(pids) == []


def test_a_server_that_died_is_named_with_the_end_of_its_log(servers):
    code = "print('\\n'.join(f'line {n}' for n in range(100))); raise SystemExit('out of luck')"
    plan = Plan(name="the bad one", command=(sys.executable, "-c", code), environment=dict(os.environ), port=find_free_port())
    with pytest.raises(BenchmarkFailed) as caught:
        servers.start(plan)
    assert [w for w in ("'the bad one' ended with code 1", "the-bad-one.log", "line 99\nout of luck") if w not in str(caught.value)] == []
    assert "line 10\n" not in str(caught.value)


def test_a_server_that_dies_later_is_found_when_it_is_used(servers, tmp_path):
    server = servers.start(make_plan(tmp_path / "short"))
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    with pytest.raises(BenchmarkFailed, match="'short' ended with code -9"):
        servers.use("short")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_benchmark_leaves_no_process(tmp_path, number):
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from pathlib import Path
from sedac.bench.bench import _ending_on_sigterm
from sedac.bench.servers import Servers
from testing.counting import make_plan
with _ending_on_sigterm(), Servers(Path({str(tmp_path)!r}) / "logs") as servers:
    found = [servers.start(make_plan(Path({str(tmp_path)!r}) / name)) for name in "ab"]
    servers.use("a")
    print(*(process.pid for server in found for process in server.find_processes()), flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as bench:
        assert bench.stdout
        pids = [int(pid) for pid in bench.stdout.readline().split()]
        assert len(pids) == 4
        bench.send_signal(number)
        bench.communicate(timeout=120)
    assert bench.returncode != 0
    assert find_living(pids) == []


def test_memory_and_processor_time_are_those_of_the_whole_group(servers, tmp_path):
    server = servers.start(make_plan(tmp_path / "a"))
    wait_until_counting(tmp_path / "a")
    alone = psutil.Process(server.process.pid).memory_full_info().pss
    assert server.measure_memory() > alone > 1e6
    assert server.measure_cpu() > 0


def test_a_command_has_what_the_matrix_says(tmp_path, monkeypatch):
    monkeypatch.setenv("SEDAC_TIERS", "leaks in from outside")
    monkeypatch.setenv("VLLM_PLUGINS", "sedac")
    data = {
        "name": "test",
        "flags": ["--enforce-eager"],
        "environment": {"A": "1"},
        "models": [{"name": "demo"}, {"name": "other", "directory": "/m", "probe_set": "/p", "draft": "/d"}],
        "systems": [
            {"name": "plain", "kind": "plain", "flags": ["--quantization", "fp8"]},
            {"name": "off", "kind": "sedac", "draft": False, "environment": {"A": "2"}},
            {"name": "on", "kind": "sedac"},
        ],
    }
    matrix = make_matrix(data)
    demo, other = matrix.models
    plans = {(m.name, s.name): plan_server(matrix, m, s, tmp_path) for m in matrix.models for s in matrix.systems}
    plain, off = plans["demo", "plain"], plans["demo", "off"]
    assert plain.command[1:3] == ("-m", "vllm.entrypoints.openai.api_server")
    assert plain.command[-3:] == ("--enforce-eager", "--quantization", "fp8")
    assert (plain.environment["VLLM_PLUGINS"], plain.environment["A"], plain.control_port) == ("", "1", 0)
    assert "SEDAC_TIERS" not in plain.environment
    assert plain.environment.keys() & {"VLLM_CPU_KVCACHE_SPACE", "VLLM_USE_V2_MODEL_RUNNER"} == off.environment.keys() & {
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_USE_V2_MODEL_RUNNER",
    }
    assert "VLLM_PLUGINS" not in off.environment, "`sedac serve` sets it"
    assert off.command[2:6] == ("sedac.app.cli", "serve", "--draft", "none")
    assert off.environment["A"] == "2"
    assert off.environment["SEDAC_CONTROL_PORT"] == str(off.control_port)
    assert off.environment["SEDAC_CONTROL_DATABASE"] == str(tmp_path / "control.sqlite3")
    assert "--draft" not in plans["demo", "on"].command
    assert plans["other", "on"].command[3:9] == ("serve", "/m", "--probe-set", "/p", "--draft", "/d")
    assert len({port for plan in plans.values() for port in (plan.port, plan.control_port) if port}) == 10
    assert demo.directory is None
    assert other.draft
