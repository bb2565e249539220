"""SEDAC_* variables mean what they say; unknown and ineffective ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sedac import launch
from sedac.errors import ConfigError
from sedac.policy import Checkpoint
from sedac.probe.manifest import Manifest, ProbeRecord
from sedac.settings import EngineSettings, read_settings

MANIFEST = Manifest(
    name="m", model="m", hidden_size=8, num_layers=12, rank=64, target="x", probes=tuple(ProbeRecord(layer=i, threshold=i / 10) for i in (2, 5, 8))
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    import os

    for name in [n for n in os.environ if n.startswith("SEDAC_")]:
        monkeypatch.delenv(name)


def test_environment_makes_the_first_policy(monkeypatch):
    for name, value in {"ENABLED": "1", "PROBE_LAYERS": "5, 8", "THRESHOLDS": "0.25,0.5", "PROBE_RANK": "64", "LOG_EVERY": "100"}.items():
        monkeypatch.setenv(f"SEDAC_{name}", value)
    settings = read_settings()
    policy = settings.make_policy(MANIFEST)
    assert policy.enabled
    assert policy.checkpoints == (Checkpoint(layer=5, threshold=0.25), Checkpoint(layer=8, threshold=0.5))
    assert settings.log_every == 100


def test_probe_set_proposes_layers_and_thresholds():
    assert [(c.layer, c.threshold) for c in EngineSettings().make_policy(MANIFEST).checkpoints] == [(2, 0.2), (5, 0.5), (8, 0.8)]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SEDAC_ADAPTIVE", "1", "SEDAC_ADAPTIVE='1' has no effect yet"),
        ("SEDAC_EXIT_RATES", "0.2,0.5", "SEDAC_EXIT_RATES"),
        ("SEDAC_TRESHOLDS", "0.2", "did you mean SEDAC_THRESHOLDS"),
        ("SEDAC_PROBE_RANK", "-3", "SEDAC_PROBE_RANK='-3'"),
        ("SEDAC_PHASE", "sometimes", "SEDAC_PHASE='sometimes'"),
        ("SEDAC_PROBE_LAYERS", "a", "SEDAC_PROBE_LAYERS"),
    ],
)
def test_wrong_variables_are_refused_by_name(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        read_settings()


def test_adaptive_off_is_accepted(monkeypatch):
    monkeypatch.setenv("SEDAC_ADAPTIVE", "0")
    assert read_settings().enabled


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"probe_layers": (2, 7)}, "SEDAC probe missing for layer 7"),
        ({"thresholds": (0.1,)}, "SEDAC_THRESHOLDS has 1 values for 3 checkpoints"),
        ({"probe_rank": 32}, "SEDAC_PROBE_RANK is 32"),
        ({"thresholds": (0.1, float("nan"), 0.2)}, r"checkpoints\[1\].threshold"),
    ],
)
def test_settings_that_do_not_fit_the_probe_set_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        read_settings(**overrides).make_policy(MANIFEST)


def test_settings_survive_the_way_through_the_environment(monkeypatch):
    first = read_settings(probe_layers=(2, 5), thresholds=(0.25, 1e-3), probe_dir=Path("/x"), scope="batch", engine_id="e 1", enabled=False)
    for name, value in first.to_env().items():
        monkeypatch.setenv(name, value)
    assert read_settings() == first


def test_engine_command_keeps_the_users_flags():
    settings = EngineSettings(model="m", probe_dir=Path("/p"), probe_layers=(2,))
    command = launch.make_engine_command(settings, ["--port", "9", "--additional-config", '{"mine": 1}'])
    assert json.loads(command[command.index("--additional-config") + 1]) == {"mine": 1, "sedac": {"probe_set": "/p", "checkpoint_layers": [2]}}
    assert command[-2:] == ["--port", "9"]
    for bad in (["--worker-cls", "x"], ["--model=x"], ["--additional-config", "no json"], ["--additional-config=[]"]):
        with pytest.raises(ConfigError):
            launch.make_engine_command(settings, bad)


def test_users_plugins_are_kept():
    env = launch.make_engine_env(EngineSettings(), {"VLLM_PLUGINS": "mine,sedac"})
    assert env["VLLM_PLUGINS"] == "sedac,sedac_agent,mine"
