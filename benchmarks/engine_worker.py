"""One vLLM engine in a process of its own, for benchmarks: a JSON job as argument, then one JSON command a line on stdin.

Commands: {"policy": {...}, "revision": n} and {"batch": b, "tokens": n}; each is answered by one JSON line on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

JOB: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_USE_V2_MODEL_RUNNER="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_PLUGINS="sedac" if JOB.get("sedac") else "none",
)


def main() -> None:
    """Start the engine, then answer commands until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints must not mix with the answers
    from vllm import LLM, SamplingParams

    keywords = JOB["llm"]
    if JOB.get("sedac"):
        keywords |= {"worker_cls": "sedac.engine.worker.SedacWorker", "additional_config": {"sedac": JOB["sedac"]}}
    llm = LLM(max_model_len=512, max_num_seqs=32, max_num_batched_tokens=2048, enable_prefix_caching=False, **keywords)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "policy" in command:
            answer = llm.collective_rpc("sedac_apply", args=(command["policy"], command["revision"]))[0]
        else:
            prompts = [{"prompt_token_ids": [(7 * i + j) % 200 + 10 for j in range(16)]} for i in range(command["batch"])]
            params = SamplingParams(temperature=0, max_tokens=command["tokens"], ignore_eos=True, detokenize=False)
            started = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            answer = {"seconds": time.perf_counter() - started}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
