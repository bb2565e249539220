"""The engine as the workshop uses it: vLLM through its public API, with SEDAC attached by configuration.

The same classes, kernels and dtype that serve also record and validate. One engine per process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

LLM = Any  # vllm.LLM, imported late: it takes seconds


def start_engine(model: str, *, layers: tuple[int, ...] = (), probe_set: Path | None = None, dtype: str = "auto", max_length: int = 512) -> LLM:
    """Start vLLM in this process: recording at `layers`, or with `probe_set` attached.

    Prefix caching is off, so that every token of every text is computed and seen.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # records are tensors: they come back by reference
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ["VLLM_PLUGINS"] = "sedac"
    os.environ.pop("SEDAC_ENABLED", None)
    from vllm import LLM

    entry: dict[str, Any] = {"checkpoint_layers": list(layers)}
    entry |= {"probe_set": str(probe_set)} if probe_set else {"record": True}
    return LLM(
        model=model,
        dtype=dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=max_length,
        max_num_batched_tokens=max(2048, max_length),
        max_num_seqs=16,
        worker_cls="sedac.engine.worker.SedacWorker",
        additional_config={"sedac": entry},
    )


def tokenise(llm: LLM, texts: list[str], max_length: int) -> list[list[int]]:
    """Tokenise texts and cut them to `max_length` tokens, leaving room for the one token that vLLM must generate."""
    tokenizer = llm.get_tokenizer()
    return [tokenizer(text)["input_ids"][: max_length - 1] for text in texts]  # vLLM's tokenizers cut from the left
