"""An engine that starts again loads what the one before it compiled, and answers the same; one with other parts compiles anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from sedac.engine.vllm import compiled
from sedac.policy.layout import Layout
from torch import nn

from tests.engine.level_steps import add_levels
from tests.engine.running import DRAFTER, TORCH_DRAFTS, run_engine

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def level_set(tmp_path_factory, short_model, short_probes, heldout_prompts) -> Path:
    return add_levels(tmp_path_factory.mktemp("probe-set"), short_model, short_probes, heldout_prompts[0])


@pytest.mark.parametrize(("dtype", "drafts"), [("bfloat16", False), pytest.param("float32", True, marks=pytest.mark.thorough)])
def test_a_restart_takes_what_was_compiled(short_model, short_drafts, level_set, heldout_prompts, tmp_path, monkeypatch, dtype, drafts):
    """In bfloat16 and float32 vLLM packs weights for other kernels, and drafts that don't run natively are compiled for themselves."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    sedac = {"probe_set": str(level_set)} | ({"draft": str(short_drafts["adapter"])} if drafts else {})
    before = TORCH_DRAFTS if drafts else ()
    llm = {"enforce_eager": False, "dtype": dtype} | ({"speculative_config": DRAFTER} if drafts else {})
    policy = {"enabled": True, "checkpoints": [{"layer": 0, "threshold": 0.5}], "speculation": {"adaptive": False}}
    run = {"do": "generate", "prompts": heldout_prompts[:8], "max_tokens": 24, "logprobs": 0}
    steps = [run | {"tiers": ["exact"] * 8}, {"do": "apply", "policy": policy, "revision": 2}, run]
    first, again = (
        run_engine(short_model, [*steps, {"do": "count_compiled", "start": start}], sedac=sedac, before=before, **llm) for start in (1, 2)
    )
    assert first[-1]["loaded"] == 0
    assert first[-1]["compiled"] == first[-1]["saved"] >= 1 + drafts
    assert again[-1] == {"compiled": 0, "saved": 0, "loaded": first[-1]["saved"]}
    assert first[:-1] == again[:-1]


class _Gated:
    has_kernels = False


def test_other_parts_are_other_graphs(monkeypatch):
    layout = Layout(num_layers=3, hidden_size=8, checkpoint_layers=(0,), probe_set="p", probe_set_sha256="1" * 64)

    def make(*layers: nn.Module) -> nn.Module:
        return nn.Sequential(*layers)

    known = compiled.make_digest(make(nn.Linear(2, 2)), layout)
    assert compiled.make_digest(make(nn.Linear(2, 2)), layout) == known
    packed, gated, kernels = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    packed.cpu_linear = lambda x: x
    for layer, has_kernels in ((gated, False), (kernels, True)):
        layer.quant_method = type("Method", (), {})()
        layer.quant_method.gated = _Gated()
        layer.quant_method.gated.has_kernels = has_kernels
    others = [make(nn.Identity()), make(nn.Linear(2, 2), nn.Linear(2, 2)), make(packed), make(gated), make(kernels)]
    digests = [known, compiled.make_digest(make(nn.Linear(2, 2)), dataclasses.replace(layout, probe_set_sha256="2" * 64))]
    digests += [compiled.make_digest(other, layout) for other in others]
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    digests.append(compiled.make_digest(make(nn.Linear(2, 2)), layout))
    assert len(set(digests)) == len(digests)
