"""The worker of benchmarks/cuda/engine.py with the GPU's forms, under Triton's interpreter: thresholds from measured gates, then a timing by them.

`python engine_calibration_job.py FOLDER`, which must be empty; the answers go to FOLDER/answers.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks" / "cuda"))


def run(folder: Path) -> dict[str, object]:
    """Calibrate half of the neurons, then generate at the contextual level."""
    import engine_models
    import engine_variants
    from engine_child import Engine

    shape = engine_models.DummyShape(hidden_size=64, num_neurons=128, num_layers=4, num_heads=2, num_kv_heads=1, vocab_size=64)
    probe_set = engine_models.write_probe_set(folder / "probe-set", shape)
    options = {
        "model": str(engine_models.write_dummy(folder / "dummy", shape)), "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "float32",
        "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 64, "enable_prefix_caching": False, "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20, "worker_cls": "engine_worker.Worker",
        "additional_config": {"sedac": {"probe_set": str(probe_set), "min_weight_mib": 0}},
    }  # fmt: skip
    engine = Engine(options, str(folder / "lock"))
    policies = {v.name: v.make_policy(shape.num_layers) for v in engine_variants.VARIANTS}
    order = {"batch": 1, "num_prompt": 8, "num_tokens": 4, "policy": policies["contextual 50 %"], "tier": engine_variants.TIER}
    before = engine.measure(**order)
    found = engine.calibrate(0.5, 48, engine_variants.make_watching_policy(shape.num_layers))
    return {"before": before["mlp_share"], "after": engine.measure(**order)["mlp_share"], **found}


if __name__ == "__main__":
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="0", VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1", VLLM_PLUGINS="sedac", TRITON_INTERPRET="1",
    )  # fmt: skip
    from tests.cuda.engine_job import use_cuda_backend

    use_cuda_backend()
    destination = Path(sys.argv[1])
    (destination / "answers.json").write_text(json.dumps(run(destination)))
