"""Steps of engine_job.py for engines that draft: answers under any sampling parameters, many draws, and what drafting does inside.

Imported by engine_job.py, in the process of the engine.
"""

from __future__ import annotations

import itertools
from collections import Counter

import torch


def _get_worker(llm):
    return llm.llm_engine.model_executor.driver_worker.worker


def find_default_tier(llm, rollout=None):
    """The tier of a request that names none: the default of the policy in force, or of the candidate where it is of that roll-out."""
    policy, candidate = getattr(llm, "policies", ({}, None))
    own = candidate["policy"] if candidate and rollout == candidate["rollout"] else policy
    return own.get("default_tier", "balanced")


def _make_params(llm, knobs):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    knobs = {"temperature": 0.0, "ignore_eos": True, **knobs}
    extra = {"sedac_speculation": knobs.pop("speculation", None), "sedac_tier": knobs.pop("tier", None) or find_default_tier(llm)}
    if "logit_bias" in knobs:
        knobs["logit_bias"] = {int(token): bias for token, bias in knobs["logit_bias"].items()}  # JSON has no numbers for keys
    if "structured_outputs" in knobs:
        knobs["structured_outputs"] = StructuredOutputsParams(**knobs["structured_outputs"])
    return SamplingParams(**knobs, extra_args={name: value for name, value in extra.items() if value is not None})


def _take(logprobs):
    return None if logprobs is None else [step and {token: entry.logprob for token, entry in step.items()} for step in logprobs]


def answer(llm, prompts, knobs, groups=()):
    """Answers to prompts, each with its own sampling parameters (or all with the same), in groups of these sizes, round and round."""
    knobs = knobs if isinstance(knobs, list) else [knobs] * len(prompts)
    sizes, results = itertools.cycle(groups or [len(prompts)]), []
    while len(results) < len(prompts):
        start = len(results)
        chosen = slice(start, start + next(sizes))
        inputs = [{"prompt_token_ids": p} for p in prompts[chosen]]
        for output in llm.generate(inputs, [_make_params(llm, k) for k in knobs[chosen]], use_tqdm=False):
            completion = output.outputs[0]
            results.append(
                {
                    "tokens": list(completion.token_ids),
                    "text": completion.text,
                    "finish": (completion.finish_reason, completion.stop_reason),
                    "logprobs": _take(completion.logprobs),
                    "prompt_logprobs": _take(output.prompt_logprobs),
                    "num_drafted": getattr(llm, "drafted", Counter())[output.request_id],
                }
            )
    return results


def draw(llm, prompt, num, knobs):
    """Tokens of `num` answers to one prompt, all of the same length: (num, length). A seed counts up from the one given."""
    seed = knobs.get("seed")
    params = [_make_params(llm, {"detokenize": False, **knobs} | ({} if seed is None else {"seed": seed + i})) for i in range(num)]
    outputs = llm.generate([{"prompt_token_ids": prompt}] * num, params, use_tqdm=False)
    return torch.tensor([list(output.outputs[0].token_ids) for output in outputs], dtype=torch.int32)


def break_verification(llm, how):
    """Spoil what verifies sampled drafts: `stock` undoes the repair of vLLM's kernel, `biased` hands it wrong draft probabilities, `` heals both."""
    from sedac.engine.vllm import sampling
    from vllm.utils import cpu_triton_utils
    from vllm.v1.sample import rejection_sampler

    runner = _get_worker(llm).model_runner
    get_probs = type(runner)._get_spec_decode_draft_probs

    def expand_stock(output, *args, **keywords):
        output.fill_(2)  # memory that nobody wrote may by chance hold the right values of an earlier step
        cpu_triton_utils._expand_kernel_impl(output, *args, **keywords)

    def get_biased(metadata):
        probs = get_probs(runner, metadata)
        return None if probs is None else probs.sqrt() / probs.sqrt().sum(-1, keepdim=True)

    rejection_sampler.expand_kernel._impl = expand_stock if how == "stock" else sampling.expand
    runner.__dict__.pop("_get_spec_decode_draft_probs", None)
    if how == "biased":
        runner._get_spec_decode_draft_probs = get_biased
    return sampling.is_sound()


def watch_drafts(llm):
    """From now on count draft tokens by request, for `answer`, and keep each context with what was drafted after it, for `drafts`."""
    worker = _get_worker(llm)
    drafter, batch = worker.sedac_drafter, worker.model_runner.input_batch
    propose, llm.drafted, llm.drafts = drafter.propose, Counter(), []

    def watched(sampled, num_tokens, token_ids, slot_mappings=None):
        drafts = propose(sampled, num_tokens, token_ids, slot_mappings)
        for row, draft in enumerate(drafts):
            llm.drafted[batch.req_ids[row].split("-")[0]] += len(draft)
            if draft and len(llm.drafts) < 4096:
                llm.drafts.append((token_ids[row, : num_tokens[row]].tolist(), list(draft)))
        return drafts

    drafter.propose = watched


def refuse_native_drafts():
    """Let draft passes run in torch; before there is an engine."""
    from sedac.engine.backends.cpu_draft import CpuDraftPass

    def refuse(*_, **__):
        raise ValueError("this test wants torch")

    CpuDraftPass.__init__ = refuse


def drafts_natively(llm):
    """Whether draft passes run in the native operator."""
    return _get_worker(llm).sedac_drafter.passes.is_one_operation


def drafts(llm):
    """What `watch_drafts` kept: (context, draft tokens)."""
    return llm.drafts


class _Writes:
    """Checks every write of drafting: the slots asked for, and what changed in the caches' memory, against the scheduler's own blocks."""

    def __init__(self, llm):
        from sedac.engine.backends.cpu_draft import CpuDraftPass
        from sedac.engine.drafting.attention import DraftAttention
        from sedac.engine.drafting.heads import HeadLayer

        worker = _get_worker(llm)
        self.runner, self.drafter = worker.model_runner, worker.sedac_drafter
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.scheduler, self.manager = scheduler, scheduler.kv_cache_manager
        assert len(self.runner.kv_cache_config.kv_cache_groups) == 1
        self.size = self.runner.input_batch.block_table[0].block_size
        self.faults, self.num_draft_slots, self.num_head_slots, self.num_last, self.owners = [], 0, 0, 0, Counter()
        self.asked, self.asked_head = [], []
        self.propose, self.drafter.propose = self.drafter.propose, self.check
        build, write, fill = DraftAttention.build, HeadLayer.write_cache, CpuDraftPass.fill

        def noted_build(attention, *args, **keywords):
            metadata, slots = build(attention, *args, **keywords)
            self.asked.append(next(iter(slots.values())).tolist())
            return metadata, slots

        def noted_write(head, *args):
            self.asked_head += args[-1].tolist()
            write(head, *args)

        def noted_fill(draft_pass, *args):
            self.asked_head += args[-1].tolist()
            fill(draft_pass, *args)

        DraftAttention.build, HeadLayer.write_cache, CpuDraftPass.fill = noted_build, noted_write, noted_fill

    def get_slot(self, request_id, position, *, is_draft):
        """The slot that a request's position has; notes a fault where it has none of its own."""
        blocks = self.manager.coordinator.get_blocks(request_id)[0]
        number = position // self.size
        if number >= len(blocks) or not blocks[number].block_id:
            self.faults.append(f"{request_id}: position {position} has no slot, {len(blocks)} blocks")
            return -1
        block = blocks[number]
        if is_draft and (block.ref_cnt != 1 or block.block_hash is not None):
            self.faults.append(f"{request_id}: position {position} is in block {block.block_id}, which others read")
        return block.block_id * self.size + position % self.size

    def check(self, sampled, num_tokens, token_ids, slot_mappings=None):
        batch, step = self.runner.input_batch, self.drafter._step
        before = [self.read(cache) for cache in self.runner.kv_caches]
        self.asked, self.asked_head = [], []
        drafts = self.propose(sampled, num_tokens, token_ids, slot_mappings)
        draft_slots, head_slots = set(), set()
        for row, draft in enumerate(drafts):
            request_id, last = batch.req_ids[row], int(num_tokens[row]) - 1
            draft_slots |= {self.get_slot(request_id, last + i, is_draft=True) for i in range(len(draft))}
            self.owners[request_id] += bool(draft)
            self.num_last += bool(draft) and last + len(draft) == self.runner.max_model_len - 1
        if step is not None and step.slots_T is not None:
            bounds = self.runner.query_start_loc.np
            for row, request_id in enumerate(step.request_ids):
                for position in step.positions_T[bounds[row] : bounds[row + 1]].tolist():
                    head_slots.add(self.get_slot(request_id, position, is_draft=False))
        asked = [slot for slots in self.asked for slot in slots]
        if len(asked) != len(set(asked)) or set(asked) != draft_slots:
            self.faults.append(f"drafts asked for slots {sorted(asked)}, their requests have {sorted(draft_slots)}")
        if sorted(self.asked_head) != sorted(head_slots):
            self.faults.append(f"the head asked for slots {sorted(self.asked_head)}, the step's tokens have {sorted(head_slots)}")
        changed = [self.find_changed(old, self.read(new)) for old, new in zip(before, self.runner.kv_caches, strict=True)]
        depth = self.drafter.manifest.depth
        for layer, slots in enumerate(changed):
            allowed = draft_slots if layer < depth else draft_slots | head_slots if layer == self.drafter.manifest.num_layers else set()
            if slots - allowed:
                self.faults.append(f"layer {layer}: slots {sorted(slots - allowed)} changed")
        self.num_draft_slots += len(set().union(*changed[:depth]) & draft_slots)
        self.num_head_slots += len(changed[-1] & head_slots)
        return drafts

    @staticmethod
    def read(cache):
        return cache.view(torch.int32).clone()  # as numbers that equal themselves

    def find_changed(self, old, new):
        """Slots whose keys or values differ; the CPU's "vec" layout has keys as (size, block), values as (block, size)."""
        attention = next(m for m in self.runner.model.modules() if type(m).__name__ == "Attention")
        heads, size = attention.num_kv_heads, attention.head_size
        differs = (old != new).reshape(old.shape[0], heads, 2 * self.size, size)
        keys, values = differs.chunk(2, dim=2)
        changed = keys.reshape(-1, heads, size, self.size).any(2).any(1) | values.any(3).any(1)
        return set(changed.reshape(-1).nonzero()[:, 0].tolist())


def watch_writes(llm):
    """From now on check every write of drafting; see `writes`."""
    llm.writes = _Writes(llm)


def writes(llm):
    """What `watch_writes` found: faults and counts."""
    found = llm.writes
    return {
        "faults": found.faults,
        "num_draft_slots": found.num_draft_slots,
        "num_head_slots": found.num_head_slots,
        "num_requests": len([r for r, count in found.owners.items() if count]),
        "num_last": found.num_last,
    }


def forget_lookahead(llm):
    """Take the slots of draft tokens away, as if `engine/vllm/speculation.py` were left out."""
    llm.llm_engine.engine_core.engine_core.scheduler.num_lookahead_tokens = 0


def measure_cache(llm):
    """Bytes of KV cache per token, by what the caches really hold, and the number of caches."""
    runner = _get_worker(llm).model_runner
    num_bytes = sum(cache.numel() * cache.element_size() for cache in runner.kv_caches)
    return {"bytes": num_bytes / runner.kv_cache_config.num_blocks / runner.cache_config.block_size, "num_caches": len(runner.kv_caches)}
