"""Runs one vLLM engine in a process of its own: `python engine_job.py JOB.json RESULT.pt`.

A job is {"llm": keyword arguments of vllm.LLM, "sedac": layout entry or null (plain vLLM, plugin not loaded), "before": [...], "steps": [...]}.
`before` names functions of drafting_steps.py that are called before there is an engine.
Each step is {"do": name, ...} and yields one result; see the functions below and those of drafting_steps.py.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path

import drafting_steps
import torch

JOB = json.loads(Path(sys.argv[1]).read_text()) if __name__ == "__main__" else {}
if __name__ == "__main__":  # workers that are spawned import this file too, and inherit the environment
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
        # One core for each rank; a single worker binds itself.
        VLLM_CPU_OMP_THREADS_BIND="|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
        if JOB.get("llm", {}).get("tensor_parallel_size")
        else "auto",
        VLLM_PLUGINS="sedac" if JOB.get("sedac") is not None else "none",
    )


DEFAULTS = {
    "max_model_len": 512, "max_num_seqs": 32, "max_num_batched_tokens": 2048, "enable_prefix_caching": False, "kv_cache_memory_bytes": 256 << 20,
}  # fmt: skip
"""of vllm.LLM, where a job says nothing; the cache has room for 32 sequences of the demo model in fp32"""


def generate(llm, prompts, batch=0, max_tokens=16, logprobs=None, tiers=None, salt=None, adapters=None, temperature=0.0, seed=0, rollouts=None):
    """Continuations in groups of `batch`, each with its tier, the number of its roll-out and LoRA adapter (a directory).

    Without a tier a request is stamped as the server does it, with the default tier of its side's policy; `unstamped` has no tier at all.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    results = []
    names = sorted({a for a in adapters or [] if a})
    lora = [LoRARequest(Path(a).name, names.index(a) + 1, a) if a else None for a in adapters or []]
    size = batch or len(prompts)
    for start in range(0, len(prompts), size):
        group = prompts[start : start + size]
        params = [
            SamplingParams(
                temperature=temperature,
                seed=seed + start + i if temperature else None,
                max_tokens=max_tokens,
                ignore_eos=True,
                logprobs=logprobs,
                detokenize=False,
                extra_args=_make_extra(llm, tiers and tiers[start + i], rollouts and rollouts[start + i]),
            )
            for i in range(len(group))
        ]
        inputs = [{"prompt_token_ids": p} | ({"cache_salt": salt} if salt else {}) for p in group]
        for output in llm.generate(inputs, params, use_tqdm=False, lora_request=lora[start : start + len(group)] if lora else None):
            completion = output.outputs[0]
            picked = [step[t].logprob for step, t in zip(completion.logprobs or [], completion.token_ids, strict=False)]
            results.append({"tokens": list(completion.token_ids), "logprobs": picked})
    return results


def _make_extra(llm, tier, rollout):
    if tier == "unstamped":
        return None
    return ({"sedac_rollout": rollout} if rollout else {}) | {"sedac_tier": tier or drafting_steps.find_default_tier(llm, rollout)}


def score(llm, prompts):
    """Log-probability of every prompt token but the first, per prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False, extra_args=_make_extra(llm, None, None))
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [[c[t].logprob for t, c in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:], strict=True)] for o in outputs]


def read_kv(llm, prompt):
    """KV cache contents for one prompt, read from the cache's memory: per layer (key, value), each (T, heads, head size)."""
    from vllm import SamplingParams

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    slots, inner = [], runner._model_forward

    def spy(**inputs):
        slots.append(runner.input_batch.block_table.block_tables[0].slot_mapping.np[: len(prompt)].copy())
        return inner(**inputs)

    runner._model_forward = spy
    params = SamplingParams(max_tokens=1, temperature=0, extra_args=_make_extra(llm, None, None))
    llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    runner._model_forward = inner
    attention = next(m for m in runner.model.modules() if type(m).__name__ == "Attention")
    assert attention.impl.kv_cache_dtype in ("auto", "float32"), attention.impl.kv_cache_dtype
    heads, size, block_size = attention.num_kv_heads, attention.head_size, runner.cache_config.block_size
    block, offset = torch.from_numpy(slots[0] // block_size), torch.from_numpy(slots[0] % block_size)
    layers = []
    for cache in runner.kv_caches:  # CPU "vec" layout: keys as (size, block), values as (block, size)
        keys, values = cache.reshape(cache.shape[0], heads, 2 * block_size, size).chunk(2, dim=2)
        keys = keys.reshape(-1, heads, size, block_size)[block, :, :, offset]
        layers.append((keys.clone(), values[block, :, offset].clone()))
    return layers


def apply(llm, policy, revision=1, candidate=None):
    """Put a policy, and a candidate beside it, into force; returns the workers' answers.

    They are strict unless they say otherwise: which levels pay differs from machine to machine.
    """
    policy = {"strict": True, **policy}
    if candidate is not None:
        candidate = {**candidate, "policy": {"strict": True, **candidate["policy"]}}
    answers = llm.collective_rpc("sedac_apply", args=(policy, revision) if candidate is None else (policy, revision, candidate))
    if not any(answer["violations"] for answer in answers):
        llm.policies = (policy, candidate)
    return answers


def preload(llm, directory, sha256):
    """Have the workers read a probe set, and wait until they have; returns the last answers."""
    llm.collective_rpc("sedac_preload", args=(directory, sha256))
    while any(answer["state"] == "loading" for answer in llm.collective_rpc("sedac_preloaded", args=(sha256,))):
        time.sleep(0.01)
    return llm.collective_rpc("sedac_preloaded", args=(sha256,))


def describe(llm):
    """What each worker has attached."""
    return llm.collective_rpc("sedac_describe")


def addresses(llm):
    """Where all that the kernels read lies."""
    state = llm.llm_engine.model_executor.driver_worker.worker.sedac_state
    sides = (state.stable, state.candidate)
    probes = [t for side in sides for probe in side.probes for t in (*probe.tensors, probe.rank)]
    return [t.data_ptr() for t in (*probes, *(t for side in sides for t in (side.knobs_CK, side.counts_C2)), *state.buffers.tensors)]


def generate_between(llm, changes, every=2, run="generate", **arguments):
    """Run `generate`, or a step of its form, while the workers get one `apply` of `changes` after the other, round and round, between two steps."""
    engine = llm.llm_engine
    step, count, answers = engine.step, itertools.count(1), []

    def change_and_step():
        number = next(count)
        if number % every == 0:
            answers.extend(apply(llm, **changes[number // every % len(changes)]))
        return step()

    engine.step = change_and_step
    try:
        return {"results": find_step(run)(llm, **arguments), "answers": answers}
    finally:
        engine.step = step


def stats(llm):
    """The worker's totals."""
    return llm.collective_rpc("sedac_get_stats")[0]


def worker_stats(llm):
    """The totals of every worker."""
    return llm.collective_rpc("sedac_get_stats")


def worker_risks(llm):
    """The risks of the last step with decisions, of every worker: (C, T), NaN where not evaluated."""
    import vllm.envs as envs

    assert envs.VLLM_ALLOW_INSECURE_SERIALIZATION
    return [torch.from_numpy(risk_CT) for risk_CT in llm.collective_rpc(lambda worker: worker.sedac_state.risk_CT)]


def counters(llm):
    """vLLM's own counters by name (needs disable_log_stats=False)."""
    return {m.name: m.value for m in llm.get_metrics() if type(m).__name__ == "Counter"}


def count_compiled(llm, start):
    """How many graphs vLLM compiled, saved and loaded at this start of the same engine."""
    from vllm.compilation.counter import compilation_counter as counter

    return {"compiled": counter.num_aot_compiles, "saved": counter.num_aot_artifacts_saved, "loaded": counter.num_aot_artifacts_loaded}


def watch_steps(llm):
    """From now on note for every pass what SEDAC may do with each row, beside the positions that the model gets; see `watched_steps`."""
    worker = llm.llm_engine.model_executor.driver_worker.worker
    runner, state, llm.watched = worker.model_runner, worker.sedac_state, []
    inner, begin = runner._model_forward, state.begin_step
    worker._sedac_requests.num_bounded += 1  # no step takes the short way of plain ones,
    state.begin_repeat = lambda tokens: False  # or of repeated ones

    def begin_step(num_tokens, tokens):
        batch, bounds = runner.input_batch, runner.query_start_loc.np
        llm.watched.append(
            {
                "decides": tokens.decides_T.tolist(),
                "bounds": bounds[: batch.num_reqs + 1].tolist(),
                "num_prompt": batch.num_prompt_tokens[: batch.num_reqs].tolist(),
                "bounded": [worker._sedac_requests._running[r].is_bounded for r in batch.req_ids],
            }
        )
        begin(num_tokens, tokens)

    def forward(**inputs):
        result = inner(**inputs)
        llm.watched[-1]["positions"] = inputs["positions"][: llm.watched[-1]["bounds"][-1]].tolist()
        return result

    state.begin_step, runner._model_forward = begin_step, forward


def watched_steps(llm):
    """What `watch_steps` noted."""
    return llm.watched


def describe_draft(llm):
    """The draft model's class and the names of its modules that SEDAC has touched."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter.model
    touched = [name for name, module in model.named_modules() if any(key.startswith("sedac") and key != "sedac_state" for key in vars(module))]
    return {"class": type(model).__name__, "state": getattr(model, "sedac_state", None) is not None, "touched": touched}


def reset_prefix_cache(llm):
    """Forget what earlier prompts left in the KV cache."""
    return llm.reset_prefix_cache()


def records(llm, prompt):
    """What the engine recorded while it read one prompt."""
    from vllm import SamplingParams

    llm.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    return llm.collective_rpc("sedac_take_records")[0]


def find_step(name):
    """The function of a step."""
    return globals().get(name) or getattr(drafting_steps, name)


def main() -> None:
    from vllm import LLM

    keywords = dict(JOB["llm"])
    if JOB.get("sedac") is not None:
        keywords |= {"worker_cls": "sedac.engine.step.worker.SedacWorker", "additional_config": {"sedac": JOB["sedac"]}}
    for name in JOB.get("before", ()):
        find_step(name)()
    llm = LLM(**DEFAULTS | keywords)
    results = []
    for step in JOB["steps"]:
        arguments = dict(step)
        name = arguments.pop("do")
        results.append(find_step(name)(llm, **arguments))
    torch.save(results, sys.argv[2])


if __name__ == "__main__":
    main()
