"""Where drafts write: slots of their own request alone, one KV cache with the model; and what they read there is what plain torch computes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.running import DRAFTER, TORCH_DRAFTS, run_engine, speculation

pytestmark = pytest.mark.engine

_LLM = {"enforce_eager": True, "dtype": "float32"}
_MAX_LEN = 128
_SMALL = {
    "max_model_len": _MAX_LEN, "block_size": 32, "num_gpu_blocks_override": 14, "max_num_seqs": 6, "max_num_batched_tokens": 40,
    "enable_prefix_caching": True, "disable_log_stats": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def crowd(heldout_prompts) -> tuple[list[list[int]], list[dict]]:
    """Prompts and lengths of 36 requests: short and long ones, some that share a beginning, some that end at the last position."""
    prompts = [
        *heldout_prompts[:24],
        *(heldout_prompts[0] * 2 + p for p in heldout_prompts[1:7]),
        *(p + q for p, q in zip(heldout_prompts[30:36], heldout_prompts[40:46], strict=True)),
    ]
    prompts = [p[: _MAX_LEN - 6] for p in prompts]
    lengths = [(3, 17, 40, 200)[i % 4] for i in range(len(prompts))]
    return prompts, [{"max_tokens": n, "detokenize": False} for n in lengths]


def _stress(demo_model, demo_probes, draft, crowd, *first, before=()):
    run = {"do": "answer", "prompts": crowd[0], "knobs": crowd[1]}
    steps = [*first, {"do": "watch_writes"}, speculation(min_confidence=0.1), run, run, {"do": "writes"}, {"do": "counters"}, {"do": "stats"}]
    sedac = {"probe_set": str(demo_probes), "draft": str(draft)}
    return run_engine(demo_model, steps, sedac=sedac, before=before, speculative_config=DRAFTER, **_LLM, **_SMALL)[-5:]


@pytest.mark.parametrize("native", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_no_slot_of_another_request_is_written(demo_model, demo_probes, drafts, crowd, native):
    """36 requests join, leave and are preempted in 14 blocks; every write is checked against the scheduler's blocks and in the caches' memory."""
    run = {"do": "answer", "prompts": crowd[0], "knobs": crowd[1]}
    plain = run_engine(demo_model, [run], max_model_len=_MAX_LEN, **_LLM)[0]
    first, second, found, counters, stats = _stress(demo_model, demo_probes, drafts["adapter"], crowd, before=() if native else TORCH_DRAFTS)
    assert found["faults"] == []
    print(f"{found}; preemptions {counters['vllm:num_preemptions']}, cached tokens {counters['vllm:prefix_cache_hits']}, {stats['drafting']}")
    assert found["num_draft_slots"] > 1000
    assert found["num_head_slots"] > 1000
    assert found["num_requests"] > 20
    assert found["num_last"] > 0, "some drafts must reach the last position"
    assert counters["vllm:num_preemptions"] > 0
    assert counters["vllm:prefix_cache_hits"] > 0
    assert stats["drafting"]["num_accepted"] > 0
    for results in (first, second):
        assert [(r["tokens"], r["finish"]) for r in results] == [(r["tokens"], r["finish"]) for r in plain]


def test_the_check_sees_drafts_without_slots_of_their_own(demo_model, demo_probes, drafts, crowd):
    """Without the slots that engine/vllm/speculation.py reserves, drafts past a block's edge go where they must not, and the check says so."""
    found = _stress(demo_model, demo_probes, drafts["exit-head"], crowd, {"do": "forget_lookahead"})[2]
    assert any("has no slot" in fault for fault in found["faults"])
    assert any("changed" in fault for fault in found["faults"])


def test_draft_and_model_share_one_cache(demo_model, demo_probes, drafts):
    """Bytes of KV per token: an exit head adds none, an adapter one layer, vLLM's draft_model a whole cache of its own."""
    measure = [{"do": "measure_cache"}]
    plain = run_engine(demo_model, measure, max_model_len=128, **_LLM)[0]
    other = {"method": "draft_model", "model": str(demo_model), "num_speculative_tokens": 4}
    separate = run_engine(demo_model, measure, max_model_len=128, speculative_config=other, **_LLM)[0]
    own = {}
    for kind in ("exit-head", "adapter"):
        sedac = {"probe_set": str(demo_probes), "draft": str(drafts[kind])}
        own[kind] = run_engine(demo_model, measure, sedac=sedac, max_model_len=128, speculative_config=DRAFTER, **_LLM)[0]
    print(f"bytes of KV per token: plain {plain}, draft_model {separate}, {own}")
    num_layers, per_layer = plain["num_caches"], plain["bytes"] / plain["num_caches"]
    assert num_layers == 12
    assert own["exit-head"] == plain
    assert own["adapter"] == {"bytes": plain["bytes"] + per_layer, "num_caches": num_layers + 1}
    assert separate == {"bytes": 2 * plain["bytes"], "num_caches": 2 * num_layers}


@pytest.mark.parametrize(("kind", "native"), [("adapter", True), ("adapter", False), pytest.param("exit-head", True, marks=pytest.mark.thorough)])
def test_drafts_are_what_plain_torch_proposes(demo_model, demo_probes, drafts, heldout_prompts, kind, native):
    """Chunked prompts, cached prefixes and rejected drafts leave in the head's cache what a pass over the whole text computes."""
    run = {"do": "answer", "prompts": heldout_prompts[:12], "knobs": {"max_tokens": 24, "detokenize": False}}
    steps = [{"do": "watch_drafts"}, speculation(min_confidence=0.2), run, run, {"do": "drafts_natively"}, {"do": "drafts"}]
    llm = {"max_model_len": 256, "max_num_batched_tokens": 48, "max_num_seqs": 12, "block_size": 32, "enable_prefix_caching": True, **_LLM}
    sedac = {"probe_set": str(demo_probes), "draft": str(drafts[kind])}
    before = () if native else TORCH_DRAFTS
    is_native, proposed = run_engine(demo_model, steps, sedac=sedac, before=before, speculative_config=DRAFTER, **llm)[-2:]
    assert is_native == native
    assert len(proposed) > 100
    reference = _Reference(demo_model, drafts[kind])
    expected = [reference.propose(context, draft) for context, draft in proposed[::3]]
    differing = sum(ours != theirs for ours, (_, theirs) in zip(expected, proposed[::3], strict=True))
    assert differing <= len(expected) // 100, f"{differing} of {len(expected)}"  # near ties may fall either way
    assert len({len(draft) for _, draft in proposed}) == 4


class _Reference:
    """The draft in transformers and plain torch, over whole texts without any cache."""

    def __init__(self, model, draft) -> None:
        from sedac.probe.draft import DraftHead, load_head, read_draft_manifest

        self.manifest = read_draft_manifest(draft)
        self.head = DraftHead(self.manifest)
        self.head.load_state_dict(load_head(draft, self.manifest))
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()

    @torch.no_grad()
    def propose(self, context: list[int], draft: list[int]) -> list[int]:
        """The token after the context, and after each draft token but the last."""
        streams = self.model(input_ids=torch.tensor([context + draft[:-1]]), output_hidden_states=True).hidden_states
        logits = self.model.lm_head(self.head(streams[self.manifest.depth]))[0]
        return logits[len(context) - 1 :].argmax(-1).tolist()
