"""One engine of benchmarks/speculation.py, in a process of its own: reads orders on stdin, one JSON object a line, and answers on stdout.

Between orders it waits in a read, and vLLM's engine process in another, so that it takes no time from the engine that runs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

SPEC = "vllm:spec_decode_num_"


@dataclass(kw_only=True)
class Wave:
    """Requests that started together, from the step in which the last of them had its first token to that in which the first finished."""

    seconds: list[float] = field(default_factory=list)
    """Seconds of each step, by the clock of vLLM's engine process."""
    num_tokens: list[int] = field(default_factory=list)
    """Tokens of each step, of all requests together."""
    num_turns: int = 0
    """Steps in which a request generated, summed over requests."""
    answers: list[list[int]] = field(default_factory=list)
    """Token ids by request, whole."""


def run_wave(llm: Any, prompts: list[list[int]], num_tokens: int, temperature: float) -> Wave:
    """Generate for all prompts at once until one of them has `num_tokens`; the others are aborted."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    params = SamplingParams(temperature=temperature, max_tokens=num_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    stamp = time.monotonic_ns()
    given: dict[str, list[int]] = {f"{stamp}-{i}": [] for i in range(len(prompts))}
    for name, prompt in zip(given, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    wave, last = Wave(), 0.0
    waiting, finished = len(prompts), False
    while not finished:
        outputs = [o for o in engine.step() if o.outputs[0].token_ids]
        if not outputs:
            continue
        now = outputs[0].metrics.last_token_ts
        for output in outputs:
            answer = given[output.request_id]
            waiting -= not answer
            answer += output.outputs[0].token_ids
            finished |= output.finished
        if last:
            wave.seconds.append(now - last)
            wave.num_tokens.append(sum(len(o.outputs[0].token_ids) for o in outputs))
            wave.num_turns += len(outputs)
        last = now if waiting == 0 else 0.0
    engine.abort_request(list(given))
    while engine.has_unfinished_requests():
        engine.step()
    time.sleep(0.02)  # async scheduling has one more step under way
    wave.answers = list(given.values())
    return wave


def count_drafts(llm: Any) -> dict[str, float]:
    """Return vLLM's own totals of speculation, whatever the method."""
    return {m.name.removeprefix(SPEC): m.value for m in llm.get_metrics() if m.name.startswith(SPEC) and hasattr(m, "value")}


class Engine:
    """An engine and what it can be told."""

    def __init__(self, options: dict[str, Any], *, is_ours: bool) -> None:
        from vllm import LLM

        self.llm, self.is_ours, self._revision = LLM(**options), is_ours, 0

    def describe(self) -> dict[str, Any]:
        """Return what the engine decided by itself."""
        config = self.llm.llm_engine.vllm_config
        cache = config.cache_config
        num_tokens = cache.num_gpu_blocks * cache.block_size
        return {"kv_bytes_per_token": cache.kv_cache_memory_bytes / num_tokens, "async": bool(config.scheduler_config.async_scheduling)}

    def set(self, speculation: dict[str, Any], controller: str) -> dict[str, Any]:
        """Apply knobs of speculation; `controller` names whose experience the controller has, new names have none."""
        from sedac.policy.model import Policy, Speculation

        self._revision += 1
        policy = Policy(speculation=Speculation(**speculation)).to_dict()
        answer = self.llm.collective_rpc("sedac_apply", args=(policy, self._revision))[0]
        self.llm.collective_rpc("bench_use_controller", args=(controller,))
        return {"violations": answer["violations"]}

    def run(self, waves: list[list[list[int]]], num_tokens: int, temperature: float) -> dict[str, Any]:
        """Run waves of prompts one after the other and return what they took."""
        before, own_before = count_drafts(self.llm), self._get_drafting()
        done = [run_wave(self.llm, prompts, num_tokens, temperature) for prompts in waves]
        drafts = {name: value - before.get(name, 0) for name, value in count_drafts(self.llm).items()}
        result: dict[str, Any] = {"waves": [vars(wave) for wave in done], "drafts": drafts}
        if self.is_ours:
            own = self._get_drafting()
            result["own"] = {name: own[name] - own_before[name] for name in ("num_passes", "draft_seconds", "step_seconds")}
            result["controller"] = list(own["controller"])
        return result

    def _get_drafting(self) -> dict[str, Any]:
        return dict(self.llm.collective_rpc("sedac_get_stats")[0]["drafting"]) if self.is_ours else {}


def main() -> None:
    """Serve orders until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is no answer
    options = json.loads(sys.argv[1])
    engine = Engine(options["llm"], is_ours=options["is_ours"])
    print(json.dumps(engine.describe()), file=answers)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(engine, order.pop("do"))(**order)), file=answers)


if __name__ == "__main__":
    main()
