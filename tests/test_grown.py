"""The grown model says what the demo model says, its drafts propose what the demo model's propose, its levels leave out the same share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sedac.probe import artifact
from sedac.probe.draft import DraftHead, load_head, save_draft
from sedac.probe.draft_manifest import DraftManifest, read_draft_manifest
from sedac.probe.levels import reduce_mlp
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "probes" / "sedac_demo"
DEPTH = 3


def _import_grown() -> Any:
    spec = importlib.util.spec_from_file_location("grown", ROOT / "benchmarks" / "grown.py")
    assert spec
    assert spec.loader
    module = sys.modules["grown"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


grown = _import_grown()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grown")
    growth = grown.grow_model(DEMO / "model", out / "model")
    grown.grow_probe_set(DEMO / "probe-set", out / "probe-set", growth)
    return out


@pytest.fixture(scope="module")
def models(directory: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    return tuple(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (DEMO / "model", directory / "model"))


@pytest.fixture(scope="module")
def token_ids() -> Tensor:
    from sedac_probes import corpus
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    texts = corpus.cut_prompts(corpus.read_stdlib("heldout"), num_prompts=4, num_chars=600)
    return torch.tensor([tokenizer(text)["input_ids"][:64] for text in texts])


@torch.inference_mode()
def test_says_what_the_demo_model_says(models: tuple[Any, Any], token_ids: Tensor) -> None:
    small, large = (model.generate(token_ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0) for model in models)
    assert large.tolist() == small.tolist()
    small, large = (model(small).logits.log_softmax(-1) for model in models)
    torch.testing.assert_close(large, small, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_has_the_streams_of_the_demo_model_at_twice_the_depth(models: tuple[Any, Any], token_ids: Tensor) -> None:
    small, large = (model(token_ids, output_hidden_states=True).hidden_states for model in models)
    for depth in (0, 1, DEPTH, 11):
        torch.testing.assert_close(large[2 * depth][..., :256], small[depth], atol=1e-4, rtol=1e-4)
        assert not large[2 * depth][..., 256:].any()


def test_has_a_mid_size_shape_and_dense_weights_that_read(models: tuple[Any, Any]) -> None:
    large = models[1]
    assert 350e6 < large.num_parameters() < 420e6
    for layer in large.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            assert (part.weight != 0).float().mean() > 0.99
    assert not large.model.layers[1].mlp.down_proj.weight.any()
    assert large.model.layers[0].mlp.down_proj.weight.any()


@pytest.mark.parametrize("kind", ["adapter", "exit-head"])
@torch.inference_mode()
def test_a_grown_draft_proposes_the_same(kind: str, directory: Path, models: tuple[Any, Any], token_ids: Tensor, tmp_path: Path) -> None:
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64} if kind == "adapter" else {}
    manifest = DraftManifest(name="x", kind=kind, model="sedac-demo", hidden_size=256, num_layers=12, depth=DEPTH, intermediate_size=640, **heads)
    torch.manual_seed(0)
    head = DraftHead(manifest)
    for name, weight in head.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1, 0.3)
        else:
            torch.nn.init.normal_(weight, 0, 0.1)
    save_draft(tmp_path / "old", manifest, head)
    growth = grown.Growth(grown.Shape.of(DEMO / "model"), grown.Shape())
    made = grown.grow_draft(tmp_path / "old", tmp_path / "new", growth)
    assert made == read_draft_manifest(tmp_path / "new")
    assert made.depth == 2 * DEPTH
    assert made.intermediate_size >= 640 * 4096 // 768
    states = []
    for path, model in ((tmp_path / "old", models[0]), (tmp_path / "new", models[1])):
        m = read_draft_manifest(path)
        loaded = DraftHead(m)
        loaded.load_state_dict(load_head(path, m))
        states.append(loaded(model(token_ids, output_hidden_states=True).hidden_states[m.depth]) @ model.lm_head.weight.T)
    torch.testing.assert_close(states[1].log_softmax(-1), states[0].log_softmax(-1), atol=1e-3, rtol=0)
    assert (states[1].argmax(-1) != token_ids).any()


def test_a_grown_reduced_draft_leaves_out_the_same_share(tmp_path: Path) -> None:
    manifest = DraftManifest(
        name="x",
        kind="reduced",
        model="sedac-demo",
        hidden_size=256,
        num_layers=12,
        depth=12,
        skip_attention=(4,),
        skip_mlp=(4, 9),
        level="contextual-30",
    )
    save_draft(tmp_path / "old", manifest, None)
    made = grown.grow_draft(tmp_path / "old", tmp_path / "new", grown.Growth(grown.Shape.of(DEMO / "model"), grown.Shape()))
    assert (made.depth, made.skip_attention, made.skip_mlp, made.level) == (24, (8, 9), (8, 9, 18, 19), "contextual-30")


@pytest.mark.parametrize("name", ["contextual-40", "width-30"])
@torch.inference_mode()
def test_a_grown_level_gives_the_same_from_the_same_share(name: str, directory: Path, models: tuple[Any, Any], token_ids: Tensor) -> None:
    sets = artifact.load(DEMO / "probe-set"), artifact.load(directory / "probe-set")
    for layer in (2, 7):
        outputs = []
        stream = models[0](token_ids[:1], output_hidden_states=True).hidden_states[layer][0]
        for found, model, i in zip(sets, models, (layer, 2 * layer), strict=True):
            part = model.model.layers[i]
            x_TD = part.post_attention_layernorm(torch.nn.functional.pad(stream, (0, model.config.hidden_size - 256)))
            level = next(one for one in found.levels if one.name == name)
            outputs.append(
                reduce_mlp(
                    x_TD,
                    part.mlp.gate_proj.weight,
                    part.mlp.up_proj.weight,
                    part.mlp.down_proj.weight,
                    level=level,
                    layer=i,
                    neurons=found.neurons[i],
                )
            )
        (small, share), (large, new_share) = outputs
        torch.testing.assert_close(large[:, :256], small, atol=1e-4, rtol=1e-4)
        assert not large[:, 256:].any()
        assert abs(float(share.mean() - new_share.mean())) < 0.01


@torch.inference_mode()
def test_a_grown_probe_predicts_the_same_risk(directory: Path, models: tuple[Any, Any], token_ids: Tensor) -> None:
    small, large = artifact.load(DEMO / "probe-set"), artifact.load(directory / "probe-set")
    streams = [model(token_ids, output_hidden_states=True).hidden_states for model in models]
    for layer, probe in small.probes.items():
        risk = large.probes[2 * layer + 1](streams[1][2 * layer + 2])
        torch.testing.assert_close(risk, probe(streams[0][layer + 1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("size", "message"), [({"hidden": 512}, "hidden size 512"), ({"layers": 30}, "30 layers"), ({"kv_heads": 4}, "heads on 4")])
def test_shapes_that_can_t_keep_the_function_are_refused(size: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grown.Growth(grown.Shape.of(DEMO / "model"), grown.Shape(**size))
