"""The image as an operator runs it: `docker run --read-only ...`, driven through Docker's own API.

Building takes minutes, so these tests take an image that exists: make image, then SEDAC_TEST_IMAGE=sedac:cpu make test ARGS=tests/container
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import docker
import pytest
from docker.errors import DockerException, ImageNotFound

if TYPE_CHECKING:
    from docker.models.containers import Container

pytestmark = pytest.mark.container
READY_SECONDS = 300


@pytest.fixture(scope="module")
def engine() -> Iterator[Container]:
    """The image, serving the demo model with its control service, as locked down as in docker-compose.yml."""
    image = os.environ.get("SEDAC_TEST_IMAGE")
    if not image:
        pytest.skip("SEDAC_TEST_IMAGE names no image (make image, then SEDAC_TEST_IMAGE=sedac:cpu)")
    try:
        client = docker.from_env()
        client.ping()
        client.images.get(image)
    except ImageNotFound:
        pytest.skip(f"the Docker engine has no image {image} (make image)")
    except DockerException as error:
        pytest.skip(f"no Docker engine answers: {error}")
    container = client.containers.run(
        image,
        detach=True,
        init=True,
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges:true"],
        tmpfs={"/tmp": ""},
        shm_size="1g",
        ports={"8000/tcp": ("127.0.0.1", None), "50051/tcp": ("127.0.0.1", None)},
    )
    try:
        wait_until_healthy(container)
        yield container
    finally:
        container.remove(force=True, v=True)
        client.close()


def wait_until_healthy(container: Container) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        container.reload()
        if container.status == "exited":
            break
        if container.health == "healthy":
            return
        time.sleep(1)
    raise AssertionError(f"{container.status}, {container.health} after at most {READY_SECONDS} s:\n{container.logs(tail=60).decode()}")


def published(container: Container, port: int) -> str:
    container.reload()
    [binding] = container.ports[f"{port}/tcp"]
    assert binding["HostIp"] == "127.0.0.1"
    return f"127.0.0.1:{binding['HostPort']}"


def complete(container: Container) -> dict[str, Any]:
    body = json.dumps({"model": "sedac-demo", "prompt": "def main(", "max_tokens": 32, "temperature": 0, "ignore_eos": True}).encode()
    url = f"http://{published(container, 8000)}/v1/completions"
    with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def counters(container: Container) -> dict[str, float]:
    """SEDAC's counters, summed over their labels."""
    with urllib.request.urlopen(f"http://{published(container, 8000)}/metrics", timeout=10) as response:
        lines = [line for line in response.read().decode().splitlines() if line.startswith("sedac_")]
    sums: dict[str, float] = {}
    for line in lines:
        name = line.partition("{")[0]
        sums[name] = sums.get(name, 0.0) + float(line.rpartition(" ")[2])
    return sums


def ctl(container: Container, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "sedac.app.cli", "ctl", *arguments, "--address", published(container, 50051), "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_completes_over_the_published_port(engine: Container) -> None:
    answer = complete(engine)
    assert answer["usage"]["completion_tokens"] == 32
    assert answer["choices"][0]["text"].strip()


def test_policy_set_over_grpc_moves_the_exit_rate(engine: Container) -> None:
    exited = {}
    for threshold in ("0", "1000"):
        ctl(engine, "policy", "set", "--threshold", f"all={threshold}", "--wait", "10")
        before = counters(engine)
        complete(engine)
        time.sleep(2)  # the agent polls the workers' counters
        after = counters(engine)
        exited[threshold] = after["sedac_exited_tokens_total"] - before["sedac_exited_tokens_total"]
        assert after["sedac_tokens_total"] - before["sedac_tokens_total"] >= 31
    assert exited["0"] == 0
    assert exited["1000"] >= 31
    [status] = ctl(engine, "status")["engines"]
    assert status["state"] == "ENGINE_STATE_SYNCED"


def test_runs_as_an_ordinary_user_without_privileges(engine: Container) -> None:
    code, output = engine.exec_run(["python", "-c", "import os; print(os.getuid(), open('/proc/1/status').read())"])
    uid, _, status = output.decode().partition(" ")
    assert (code, uid) == (0, "10001")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) == 0
    assert fields["NoNewPrivs"] == "1"


def test_writes_to_its_volumes_only(engine: Container) -> None:
    code, output = engine.exec_run(["python", "-c", "open('/opt/sedac/x', 'w')"])
    assert code != 0
    assert b"Read-only file system" in output
    assert engine.exec_run(["test", "-s", "/var/lib/sedac/control.sqlite3"])[0] == 0
    assert not engine.exec_run(["find", "/opt/sedac", "-writable", "-not", "-type", "l"])[1].strip()


def test_revisions_survive_a_restart_and_sigterm_ends_it(engine: Container) -> None:
    """Last, because it stops the container of the other tests."""
    revision = ctl(engine, "policy", "get")["revision"]
    engine.stop(timeout=60)
    engine.reload()
    assert engine.attrs["State"]["ExitCode"] == 0
    engine.start()
    wait_until_healthy(engine)
    assert ctl(engine, "policy", "get")["revision"] == revision
