"""A real engine: probe sets swapped in while it runs, and two policies side by side in one batch; each as if it were alone.

In fp32, where batch sizes do not change a greedy token.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.running import run_engine

pytestmark = pytest.mark.engine

_ENGINE = {"enforce_eager": True, "dtype": "float32"}
_MAX_TOKENS = 24


@pytest.fixture(scope="module")
def second_set(demo_probes, tmp_path_factory) -> tuple[Path, str]:
    """Random probes of a lower rank for two of the demo's three checkpoints, without levels of their own; and their digest."""
    from sedac.probe import artifact
    from sedac.probe.manifest import Manifest, ProbeRecord, read_manifest
    from sedac.probe.probe import LREProbe

    demo, directory = read_manifest(demo_probes), tmp_path_factory.mktemp("second") / "set"
    torch.manual_seed(5)
    probes = {p.layer: LREProbe(demo.hidden_size, demo.rank // 2) for p in demo.probes[:2]}
    manifest = Manifest(
        name="second", model=demo.model, hidden_size=demo.hidden_size, num_layers=demo.num_layers, rank=demo.rank // 2, target="nothing",
        probes=tuple(ProbeRecord(layer=layer, threshold=0.7) for layer in probes),
    )  # fmt: skip
    return directory, artifact.save(directory, manifest, probes).sha256


def _policies(demo_probes) -> tuple[dict, dict]:
    from sedac.probe.manifest import read_manifest

    records = read_manifest(demo_probes).probes
    first = {"enabled": True, "checkpoints": [{"layer": p.layer, "threshold": p.metrics["risk_q0.4"]} for p in records]}
    second = {
        "enabled": True, "rule": "accumulate", "decay": 0.8,
        "checkpoints": [{"layer": p.layer, "threshold": 1.5, "target": target} for p, target in zip(records[:2], (0.6, 0.9), strict=True)],
    }  # fmt: skip
    return first, second


def _tokens(results) -> list[list[int]]:
    return [r["tokens"] for r in results]


def test_swaps_and_sides_compute_what_each_policy_would_alone(demo_model, demo_probes, heldout_prompts, second_set):
    prompts, (directory, sha256) = heldout_prompts[:12], second_set
    first, second = _policies(demo_probes)
    named = {**second, "probe_set": "second"}
    run = {"do": "generate", "prompts": prompts, "max_tokens": _MAX_TOKENS}
    candidate = {"rollout": 3, "policy": named, "share": 0.5}
    changes = [  # one of them always names the second set, else it would be forgotten
        {"policy": first, "revision": 10, "candidate": {**candidate, "rollout": 4}},
        {"policy": named, "revision": 11},
        {"policy": named, "revision": 11, "candidate": {"rollout": 5, "policy": first, "share": 0.5}},
    ]
    exact = ["exact" if i % 2 else None for i in range(12)]
    steps = [
        {"do": "describe"}, {"do": "addresses"}, run,
        {"do": "apply", "policy": first}, run,
        {"do": "apply", "policy": named, "revision": 2},
        {"do": "preload", "directory": str(directory), "sha256": sha256},
        {"do": "apply", "policy": first, "revision": 2, "candidate": candidate},
        run | {"tiers": ["exact", None, None] * 4, "rollouts": [3, None, 3] * 4},
        {"do": "stats"},
        {"do": "apply", "policy": named, "revision": 3}, run,
        {"do": "generate_between", "changes": changes, **{k: v for k, v in run.items() if k != "do"}, "tiers": exact, "rollouts": [4] * 12},
        {"do": "apply", "policy": first, "revision": 20}, run,
        {"do": "addresses"}, {"do": "stats"},
    ]  # fmt: skip
    results = run_engine(demo_model, steps, sedac={"probe_set": str(demo_probes), "levels": False}, **_ENGINE)
    (layout,), before, plain, _, alone, refused, (loaded,), (both,), mixed, stats, _, promoted, between, _, back, after, totals = results
    sedac = {"probe_set": str(directory), "levels": False}
    _, other = run_engine(demo_model, [{"do": "apply", "policy": second}, run], sedac=sedac, **_ENGINE)
    plain, alone, other, mixed = _tokens(plain), _tokens(alone), _tokens(other), _tokens(mixed)
    assert len({str(tokens) for tokens in (plain, alone, other)}) == 3, "the policies must show"

    assert (layout["max_rank"], layout["levels_sha256"]) == (128, "")
    assert [v[0] for v in refused[0]["violations"]] == ["probe_set"], "not preloaded yet"
    assert loaded == {"state": "ready", "problem": ""}
    assert both == {"revision": 2, "rollout": 3, "violations": []}
    assert mixed[::3] == plain[::3], "exact requests, in either side"
    assert mixed[1::3] == alone[1::3], "the stable side"
    assert mixed[2::3] == other[2::3], "the candidate's"
    assert (stats["active_revision"], stats["active_rollout"]) == (2, 3)
    assert _tokens(promoted) == other
    assert _tokens(back) == alone

    assert len(between["answers"]) >= 10
    assert not any(answer["violations"] for answer in between["answers"])
    assert _tokens(between["results"])[1::2] == plain[1::2], "exact requests while probes are swapped between their steps"
    assert [len(tokens) for tokens in _tokens(between["results"])] == [_MAX_TOKENS] * 12
    assert totals["num_torn_steps"] == 0
    assert after == before, "everything stays where it was"
