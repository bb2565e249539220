"""Reduced levels and tiers in the engine: against an independent forward pass, in mixed batches, and adapted online."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.engine.level_steps import TIERS, add_levels, check_levels, make_level_steps, make_policy
from tests.engine.running import run_engine

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def level_set(tmp_path_factory, demo_model, demo_probes, heldout_prompts) -> Path:
    return add_levels(tmp_path_factory.mktemp("probe-set"), demo_model, demo_probes, heldout_prompts[0])


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.thorough)], ids=["eager", "compiled"])
def test_levels_equal_the_reference(demo_model, demo_probes, heldout_prompts, level_set, eager):
    prompts = [p[:40] for p in heldout_prompts[:4]]
    steps = make_level_steps(demo_probes, prompts)
    results = run_engine(demo_model, steps, sedac={"probe_set": str(level_set)}, enforce_eager=eager, dtype="float32")
    check_levels(demo_model, level_set, prompts, results)


def test_mixed_batch_gives_each_request_its_own_rule(demo_model, demo_probes, heldout_prompts, level_set):
    """16 requests of four tiers at once: each as it comes out alone; and exact ones as plain vLLM computes them, bit for bit."""
    _, policy = make_policy(demo_probes, tiers=TIERS)
    prompts = [p[:48] for p in heldout_prompts[:16]]
    tiers = ["exact", "conservative", "balanced", "aggressive"] * 4
    generate = {"do": "generate", "prompts": prompts, "tiers": tiers, "max_tokens": 32, "logprobs": 0}
    steps = [{"do": "apply", "policy": policy}, generate, {**generate, "batch": 1}, {"do": "stats"}]
    _, mixed, alone, stats = run_engine(demo_model, steps, sedac={"probe_set": str(level_set)}, enforce_eager=True, dtype="float32")
    assert [r["tokens"] for r in mixed] == [r["tokens"] for r in alone]
    worst = max(abs(a - b) for x, y in zip(mixed, alone, strict=True) for a, b in zip(x["logprobs"], y["logprobs"], strict=True))
    assert worst < 5e-3
    (plain,) = run_engine(demo_model, [{**generate, "tiers": None, "batch": 1}], enforce_eager=True, dtype="float32")
    assert [r for r, t in zip(alone, tiers, strict=True) if t == "exact"] == [r for r, t in zip(plain, tiers, strict=True) if t == "exact"]
    assert [r["tokens"] for r in alone] != [r["tokens"] for r in plain]
    work = {t["name"]: t["num_mlp_blocks_computed"] / t["num_tokens"] / 12 for t in stats["tiers"] if t["num_tokens"]}
    assert work["exact"] == 1
    assert work["aggressive"] < work["balanced"] < work["conservative"] < 1


@pytest.mark.parametrize(
    ("dtype", "num_phases"),
    [("float32", 3), pytest.param("float32", 8, marks=pytest.mark.thorough), pytest.param("bfloat16", 8, marks=pytest.mark.thorough)],
)
def test_adaptation_reaches_its_target_rates_on_heldout_prompts(demo_model, demo_probes, heldout_prompts, dtype, num_phases):
    """Targets 0.2 / 0.5 / 0.8 from thresholds far off, then prose in place of code; jitter and recovery are printed."""
    _, policy = make_policy(demo_probes, "risk_q0.02", default_tier="balanced", tiers=[{"name": "balanced", "level": "full"}])
    adaptation = {"enabled": True, "target_exit_rates": [0.2, 0.5, 0.8], "alpha": 0.1, "warmup_steps": 8, "window_tokens": 1024}
    targets = dict(zip([c["layer"] for c in policy["checkpoints"]], adaptation["target_exit_rates"], strict=True))
    prose = [[1 + (i * 37 + j * j) % 300 for j in range(40)] for i in range(32)]
    steps = [{"do": "apply", "policy": {**policy, "adaptation": adaptation}}]
    phases = (heldout_prompts[:32], heldout_prompts, heldout_prompts, prose, 4 * prose, 2 * prose, 2 * heldout_prompts, heldout_prompts)
    for prompts in phases[:num_phases]:
        steps += [{"do": "generate", "prompts": prompts, "max_tokens": 48}, {"do": "stats"}]
    llm = {"enforce_eager": True, "dtype": dtype, "max_num_seqs": 16}
    results = run_engine(demo_model, steps, sedac={"probe_set": str(demo_probes)}, **llm)
    snapshots = results[2::2]
    rates = []
    for before, after in zip([None, *snapshots[:-1]], snapshots, strict=True):
        totals = {c["layer"]: (c["num_evaluated"], c["num_exited"]) for c in before["checkpoints"]} if before else {}
        rates.append(
            {
                c["layer"]: (c["num_exited"] - totals.get(c["layer"], (0, 0))[1]) / (c["num_evaluated"] - totals.get(c["layer"], (0, 0))[0])
                for c in after["checkpoints"]
            }
        )
    print("exit rates per phase (warm-up, code, code; other text at once, settling, settled; code settling, settled):", rates)
    for phase in (phase for phase in (2, 5, 7) if phase < num_phases):
        for layer, target in targets.items():
            assert math.isclose(rates[phase][layer], target, abs_tol=0.03), (phase, layer, rates)
