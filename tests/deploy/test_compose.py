"""What docker-compose.yml and the Dockerfile promise about safety, read from the files; tests/container asks a running engine."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from sedac.settings import EngineSettings

ROOT = Path(__file__).resolve().parents[2]
OURS = ("engine", "engine-gpu", "control")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return parsed


def test_every_service_is_locked_down(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {*OURS, "prometheus", "grafana"}
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["init"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "/tmp" in service["tmpfs"], name
        assert not {"privileged", "network_mode", "pid"} & set(service), name
        assert not any("docker.sock" in volume for volume in service.get("volumes", [])), name


def test_ports_are_published_on_loopback_only(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service["ports"]]
    assert len(ports) == len(compose["services"])
    assert all(re.fullmatch(r"127\.0\.0\.1:\$\{SEDAC_COMPOSE_[A-Z_]+:-\d+\}:\d+", port) for port in ports), ports


def test_images_of_others_are_pinned_and_ours_are_built(compose: dict[str, Any]) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for name, service in compose["services"].items():
        if name in OURS:
            assert service["build"]["target"] in targets
            assert service["image"] == f"sedac:{service['build']['target']}"  # the tag that `make image` gives
        else:
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), service["image"]


def test_engines_wait_for_a_healthy_control_service(compose: dict[str, Any]) -> None:
    for name in ("engine", "engine-gpu"):
        service = compose["services"][name]
        assert service["depends_on"] == {"control": {"condition": "service_healthy"}}
        assert "control:50051" in service["command"]
        assert int(service["healthcheck"]["start_period"].removesuffix("s")) >= 300
    assert compose["services"]["engine-gpu"]["profiles"] == ["gpu"]
    assert not any("profiles" in service for name, service in compose["services"].items() if name != "engine-gpu")


def test_mounted_files_exist(compose: dict[str, Any]) -> None:
    volumes = [volume.split(":") for service in compose["services"].values() for volume in service.get("volumes", [])]
    for source, _target, *mode in volumes:
        if source.startswith("."):
            assert (ROOT / source).exists(), source
            assert mode == ["ro"], source
        else:
            assert source in compose["volumes"], source


def test_prometheus_asks_the_services_that_exist(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    names = [name for job in config["scrape_configs"] for discovery in job["dns_sd_configs"] for name in discovery["names"]]
    assert sorted(names) == sorted(OURS)
    assert set(re.findall(r'job="([\w-]+)"', (ROOT / "deploy/prometheus/rules.yml").read_text())) <= {
        job["job_name"] for job in config["scrape_configs"]
    }


def test_images_run_as_a_user_and_say_how_they_are() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    final = {stage.split()[2]: stage for stage in stages if len(stage.split()) > 2 and stage.split()[2] in ("cpu", "cuda", "control")}
    assert set(final) == {"cpu", "cuda", "control"}
    assert stages[-1] == final["cpu"]  # what `docker build .` makes
    for name, stage in final.items():
        assert re.search(r"^USER 10001:10001$", stage, re.MULTILINE), name
        assert re.search(r"^HEALTHCHECK .*start-period", stage, re.MULTILINE), name
        assert re.search(r'^CMD \["(serve|control)"', stage, re.MULTILINE), name
    assert "curl" not in "".join(final.values())


def test_engines_take_every_variable_from_where_compose_runs(compose: dict[str, Any]) -> None:
    module = runpy.run_path(str(ROOT / "deploy" / "compose_variables.py"))
    text = (ROOT / "docker-compose.yml").read_text()
    assert module["render"](text) == text, "run `make docs`"
    assert module["ELSEWHERE"] < {name.upper() for name in EngineSettings.model_fields}, "none that is gone"
    expected = {f"SEDAC_{name.upper()}" for name in EngineSettings.model_fields} - {f"SEDAC_{name}" for name in module["ELSEWHERE"]}
    for name in ("engine", "engine-gpu"):
        passed = {key: value for key, value in compose["services"][name]["environment"].items() if key.startswith("SEDAC_")}
        assert set(passed) == expected, name
        assert all(value == f"${{{key}:-}}" for key, value in passed.items()), "empty means unset"
    assert "environment" not in compose["services"]["control"]


@pytest.mark.parametrize("profile", [[], ["--profile", "gpu"]])
def test_compose_accepts_the_file(profile: list[str]) -> None:
    if (command := shutil.which("docker-compose")) is not None:
        compose = [command]
    elif shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0:
        compose = ["docker", "compose"]
    else:
        pytest.skip("neither docker-compose nor docker compose is installed")
    done = subprocess.run([*compose, *profile, "config", "--quiet"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
