"""The engine as the workshop uses it: vLLM through its public API, with SEDAC attached by configuration.

The same classes, kernels and dtype that serve also record and validate. One engine per process.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sedac.errors import ConfigError

LLM = Any  # vllm.LLM, imported late: it takes seconds
DTYPES = ("auto", "float32", "bfloat16", "float16")


def start_engine(
    model: str,
    *,
    layers: tuple[int, ...] = (),
    probe_set: Path | None = None,
    dtype: str = "auto",
    max_length: int = 512,
    top_k: int = 8,
    tensor_parallel_size: int = 1,
    keeps_final: bool = False,
    num_sequences: int = 16,
    draft: Path | None = None,
    num_draft_tokens: int = 4,
    is_eager: bool = True,
) -> LLM:
    """Start vLLM in this process: recording at `layers` with the `top_k` most likely tokens, or with `probe_set` or `draft` attached.

    `keeps_final` records the final states in place of what the lm_head says of them; see `Recorder`.

    Prefix caching is off, so that every token of every text is computed and seen.

    Raises:
        ConfigError: an unknown dtype, or more ranks than cores.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}; give one of {', '.join(DTYPES)}")
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # records are tensors: they come back by reference
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ["VLLM_PLUGINS"] = "sedac"
    os.environ.pop("SEDAC_ENABLED", None)
    if tensor_parallel_size > 1:
        if tensor_parallel_size > len(cores):
            raise ConfigError(f"--tensor-parallel-size is {tensor_parallel_size}, this machine has {len(cores)} cores; give at most that many")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, cores[:tensor_parallel_size])))  # a core for each rank
    from vllm import LLM

    entry: dict[str, Any] = {"checkpoint_layers": list(layers)}
    if probe_set or draft:
        entry |= {"probe_set": str(probe_set or ""), "draft": str(draft or "")}
    else:
        entry |= {"record": True, "record_top_k": top_k} | ({"record_final": True} if keeps_final else {})
    speculative = {"method": "custom_class", "model": "sedac.engine.drafting.drafter.Drafter", "num_speculative_tokens": num_draft_tokens}
    return LLM(
        model=model,
        dtype=dtype,
        enforce_eager=is_eager,
        enable_prefix_caching=False,
        max_model_len=max_length,
        max_num_batched_tokens=max(2048, max_length),
        max_num_seqs=num_sequences,
        worker_cls="sedac.engine.step.worker.SedacWorker",
        additional_config={"sedac": entry},
        **({"tensor_parallel_size": tensor_parallel_size} if tensor_parallel_size > 1 else {}),
        **({"speculative_config": speculative} if draft else {}),
    )


def read_config(model: str) -> dict[str, Any]:
    """Return what config.json says of the language model.

    Raises:
        ConfigError: there is none, or it describes no decoder.
    """
    path = Path(model) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model} is no model directory ({path}: {error}); name one with config.json and safetensors") from error
    config = config.get("text_config", config)
    if missing := [key for key in ("num_hidden_layers", "hidden_size", "vocab_size") if not isinstance(config.get(key), int)]:
        raise ConfigError(f"{path} has no {', '.join(missing)}; name a decoder language model")
    found: dict[str, Any] = config
    return found


def tokenise(llm: LLM, texts: list[str], max_length: int) -> list[list[int]]:
    """Tokenise texts and cut them to `max_length` tokens, leaving room for the one token that vLLM must generate."""
    tokenizer = llm.get_tokenizer()
    return [tokenizer(text)["input_ids"][: max_length - 1] for text in texts]  # vLLM's tokenizers cut from the left
