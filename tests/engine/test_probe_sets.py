"""Probe sets read beside a running engine: what fits comes into force by name, what does not is refused and changes nothing."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sedac.engine.step.state import State
from sedac.errors import PolicyInvalid
from sedac.policy.model import Candidate, Checkpoint, Policy
from sedac.probe import artifact
from sedac.probe.levels import Level, Neurons
from sedac.probe.manifest import LevelRecord, Manifest, ProbeRecord
from sedac.probe.probe import LREProbe

from tests.engine.states import LAYOUT, make_state

POLICY = Policy(enabled=True, checkpoints=(Checkpoint(layer=3, threshold=0.5),))


def write_set(directory: Path, name: str = "second", *, rank: int = 4, layers=(1, 3), hidden: int = 24, levels: bool = False) -> str:
    """Write a random probe set and return its digest."""
    probes = {layer: LREProbe(hidden, rank) for layer in layers}
    records = tuple(ProbeRecord(layer=layer, threshold=0.5) for layer in layers)
    manifest = Manifest(name=name, model="m", hidden_size=hidden, num_layers=6, rank=rank, target="x", probes=records)
    if not levels:
        return artifact.save(directory, manifest, probes).sha256
    level = LevelRecord(name="width-50", reduction="width", saved=0.5, perplexity_ratio=1.0)
    manifest = replace(manifest, intermediate_size=64, activation="silu", levels=(level,))
    own = Level(name="width-50", reduction="width", parameters_L=torch.full((6,), 32, dtype=torch.int32))
    neurons = {i: Neurons(order_F=torch.arange(64).int(), scale_F=torch.ones(64), repair_FD=None) for i in range(6)}
    return artifact.save(directory, manifest, probes, levels=[own], neurons=neurons).sha256


def preload(state: State, directory: Path, sha256: str) -> dict:
    state.probe_sets.preload(directory, sha256)
    deadline = time.monotonic() + 60
    while state.probe_sets.get_state(sha256)["state"] == "loading":
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return state.probe_sets.get_state(sha256)


def test_a_preloaded_set_comes_into_force_by_name(tmp_path):
    state, sha256 = make_state(True), write_set(tmp_path)
    assert state.probe_sets.get_state(sha256) == {"state": "unknown", "problem": ""}
    before = torch.get_rng_state()
    assert preload(state, tmp_path, sha256) == {"state": "ready", "problem": ""}
    assert torch.equal(torch.get_rng_state(), before), "reading a set must not draw from the numbers that vLLM samples with"
    state.apply(replace(POLICY, probe_set="second"), 2)
    stream = torch.randn(3, 24)
    for buffer, layer in zip(state.stable.probes, LAYOUT.checkpoint_layers, strict=True):
        assert torch.equal(buffer.probe(stream), artifact.load(tmp_path).probes[layer](stream))
    assert state.probe_sets.get_state(LAYOUT.probe_set_sha256)["state"] == "ready"


@pytest.mark.parametrize(
    ("kwargs", "problem"),
    [
        ({"rank": 12}, r"'second' can't be loaded: its rank 12 is over 11, the most that is attached; restart the engine"),
        ({"layers": (2, 3)}, r"it has a probe for layer 2, attached are 1, 3; restart the engine"),
        ({"hidden": 32}, r"made for hidden_size 32, the model has 24; train a set for this model"),
        ({"levels": True}, r"its reduced levels \(\w{12}\.\.\.\) are not those attached \(none\); restart the engine"),
    ],
)
def test_what_needs_a_restart_is_refused_and_says_so(tmp_path, kwargs, problem):
    state, sha256 = make_state(True), write_set(tmp_path, **kwargs)
    state.apply(POLICY, 1)
    before = [t.clone() for p in state.stable.probes for t in p.tensors]
    assert preload(state, tmp_path, sha256)["state"] == "failed"
    with pytest.raises(PolicyInvalid, match=problem) as refused:
        state.apply(replace(POLICY, probe_set="second"), 2)
    assert [v.field for v in refused.value.violations] == ["probe_set"]
    with pytest.raises(PolicyInvalid, match=problem) as refused:
        state.apply(replace(POLICY, sensitivity=1.0), 2, Candidate(rollout=1, policy=replace(POLICY, probe_set="second"), share=0.5))
    assert [v.field for v in refused.value.violations] == ["candidate.policy.probe_set"]
    assert (state.revision, state.rollout, state.stable.policy) == (1, 0, POLICY)
    assert all(torch.equal(a, b) for a, b in zip(before, [t for p in state.stable.probes for t in p.tensors], strict=True))


def test_an_absent_set_a_missing_probe_and_a_broken_file_are_refused(tmp_path):
    state = make_state(True)
    with pytest.raises(PolicyInvalid, match=r"probe_set: 'second' is neither attached \('t' is\) nor"):
        state.apply(replace(POLICY, probe_set="second"), 1)
    sha256 = write_set(tmp_path, layers=(1,))
    preload(state, tmp_path, sha256)
    with pytest.raises(PolicyInvalid, match=r"checkpoints\[0\]\.layer: 3 has no probe in 'second' \(it has 1\)"):
        state.apply(replace(POLICY, probe_set="second"), 1)
    assert "was asked for; fetch the probe set again" in preload(state, tmp_path, "1" * 64)["problem"]
    weights = tmp_path / artifact.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "copy the probe set again" in preload(state, tmp_path, "2" * 64)["problem"]
    assert "SEDAC probe set missing" in preload(state, tmp_path / "nowhere", "3" * 64)["problem"]
    write_set(tmp_path, "other")
    assert preload(state, tmp_path, "2" * 64)["state"] == "failed"
    assert state.revision == 0


def test_sets_that_no_policy_names_are_dropped_but_not_those_asked_for_since(tmp_path):
    state = make_state(True)
    digests = {}
    for name in ("first", "second", "third"):
        digests[name] = write_set(tmp_path / name, name)
        preload(state, tmp_path / name, digests[name])

    def find() -> set[str]:
        return {name for name, sha256 in digests.items() if state.probe_sets.get_state(sha256)["state"] == "ready"}

    state.apply(replace(POLICY, probe_set="first"), 1, Candidate(rollout=1, policy=replace(POLICY, probe_set="second"), share=0.5))
    assert find() == {"first", "second", "third"}
    with pytest.raises(PolicyInvalid):
        state.apply(replace(POLICY, probe_set="nowhere"), 2)
    assert find() == {"first", "second", "third"}, "a refusal changes nothing"
    state.apply(replace(POLICY, probe_set="second"), 2)
    assert find() == {"second"}
    preload(state, tmp_path / "first", digests["first"])
    state.apply(POLICY, 3)
    assert find() == {"first"}
    preload(state, tmp_path / "first", digests["first"])
    state.apply(POLICY, 4)
    assert find() == {"first"}
    state.apply(POLICY, 5)
    assert find() == set()


def test_reading_goes_on_beside_the_steps(tmp_path, monkeypatch):
    state, sha256 = make_state(True), write_set(tmp_path)
    may_read, load = threading.Event(), artifact.load

    def load_slowly(directory):
        assert may_read.wait(60)
        return load(directory)

    monkeypatch.setattr(artifact, "load", load_slowly)
    state.probe_sets.preload(tmp_path, sha256)
    state.probe_sets.preload(tmp_path, sha256)
    assert state.probe_sets.get_state(sha256) == {"state": "loading", "problem": ""}
    state.begin_step(1, None)
    state.end_step()
    state.apply(POLICY, 1)
    with pytest.raises(PolicyInvalid, match="probe_set"):
        state.apply(replace(POLICY, probe_set="second"), 2)
    may_read.set()
    assert preload(state, tmp_path, sha256)["state"] == "ready"
    state.apply(replace(POLICY, probe_set="second"), 2)
    assert sum(thread.name == "sedac-preload" for thread in threading.enumerate()) <= 1
