"""A real vLLM engine on the CPU whose SEDAC decides and computes with the GPU's forms, under Triton's interpreter, or with its own kernels.

`python engine_job.py device|native RESULT.json`, on the demo model in fp32: requests of several tiers, in waves, so that some finish
while others run. What comes back must be the same both ways.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "probes" / "sedac_demo"


def use_cuda_backend() -> None:
    """Let models on the CPU take the backend of a GPU, and leave the weights where those read them."""
    from benchmarks.cuda.interpreter import use_interpreter

    use_interpreter()
    import sedac.engine.vllm.runner  # noqa: F401  checks vLLM, before it is changed here
    from sedac.engine.backends import choice
    from sedac.engine.backends.cuda.backend import CudaBackend
    from vllm.model_executor.layers import utils

    choice.choose_backend = lambda *_, min_weight_bytes: functools.partial(CudaBackend, min_weight_bytes=min_weight_bytes)
    pack = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: pack(layer, remove_weight=False)


def run() -> dict[str, Any]:
    """Start the engine, generate, and return all that the outside sees of it."""
    from sedac.probe.manifest import read_manifest
    from vllm import LLM, SamplingParams

    probe_set = DEMO / "probe-set"
    layout = {"probe_set": str(probe_set), "min_weight_mib": 0}  # the demo model is small
    llm = LLM(
        model=str(DEMO / "model"), max_model_len=128, max_num_seqs=8, max_num_batched_tokens=128, enable_prefix_caching=False, dtype="float32",
        enforce_eager=True, worker_cls="sedac.engine.step.worker.SedacWorker", additional_config={"sedac": layout},
    )  # fmt: skip
    manifest = read_manifest(probe_set)
    names = [level.name for level in manifest.levels]
    contextual, width = (next(n for n in names if n.startswith(kind)) for kind in ("contextual", "width"))
    policy = {
        "enabled": True,
        "checkpoints": [{"layer": p.layer, "threshold": p.metrics["risk_q0.4"]} for p in manifest.probes],
        "tiers": [
            {"name": "balanced", "level": "skip"}, {"name": "narrow", "floor": width, "level": "skip"},
            {"name": "chosen", "floor": contextual, "level": width},
        ],
    }  # fmt: skip
    answers = llm.collective_rpc("sedac_apply", args=(policy, 3))
    tiers = ["exact", "balanced", "narrow", "chosen", "balanced", "narrow"]
    params = [
        SamplingParams(temperature=0, max_tokens=3 + i, ignore_eos=True, logprobs=0, detokenize=False, extra_args={"sedac_tier": tier})
        for i, tier in enumerate(tiers)
    ]
    prompts = [{"prompt_token_ids": [(17 * i + 5 * t) % 900 + 1 for t in range(7 + i)]} for i in range(len(tiers))]
    tokens, logprobs, reports = [], [], []
    for group in (range(3), range(3, 6), range(1, 2)):
        for output in llm.generate([prompts[i] for i in group], [params[i] for i in group], use_tqdm=False):
            (completion,) = output.outputs
            tokens.append(list(completion.token_ids))
            logprobs.append([step[t].logprob for step, t in zip(completion.logprobs, completion.token_ids, strict=True)])
            reports.append(llm.collective_rpc("sedac_get_report", args=(output.request_id,))[0])
    stats = llm.collective_rpc("sedac_get_stats")[0]
    shown = [{k: r[k] for k in ("tier", "revision", "num_tokens")} for r in reports]
    counted = [{k: c[k] for k in ("layer", "num_evaluated", "num_exited")} for c in stats["checkpoints"]]
    tiers_seen = [{k: t[k] for k in ("name", "num_tokens", "num_exited")} for t in stats["tiers"]]
    return {
        "answers": answers, "tokens": tokens, "logprobs": logprobs, "reports": shown, "checkpoints": counted, "tiers": tiers_seen,
        "steps": [stats["num_steps"], stats["num_tokens"], stats["num_decode_tokens"], stats["num_torn_steps"]],
        "saved": stats["num_mlp_blocks_skipped"], "mlp_shares": [r["mlp_share"] for r in reports],
    }  # fmt: skip


if __name__ == "__main__":
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="0", VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1", VLLM_ALLOW_INSECURE_SERIALIZATION="1", VLLM_PLUGINS="sedac",
    )  # fmt: skip
    if sys.argv[1] == "device":
        os.environ["TRITON_INTERPRET"] = "1"
        use_cuda_backend()
    Path(sys.argv[2]).write_text(json.dumps(run(), default=functools.partial(str)))
