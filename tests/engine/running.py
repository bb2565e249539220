"""Real vLLM engines on the demo model and on tiny random ones: a job of one is run once in a session, whoever asks."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from testing.forked import run_python
from testing.shared import make_once

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "probes" / "sedac_demo"


class EngineFailed(Exception):
    """The engine's process ended with an error; carries its output."""


@functools.cache
def _run(job: str, all_cores: bool) -> list[Any]:
    def make(result_path: Path) -> None:
        with tempfile.TemporaryDirectory() as directory:
            job_path, made = Path(directory) / "job.json", Path(directory) / "result.pt"
            job_path.write_text(job)
            done = run_python(Path(__file__).with_name("engine_job.py"), job_path, made, timeout=900, cwd=directory, all_cores=all_cores)
            if done.returncode:
                raise EngineFailed(done.stdout + done.stderr)
            shutil.move(made, result_path)

    name = hashlib.sha256(job.encode()).hexdigest()
    return torch.load(make_once(f"answers/{name}.pt", make), weights_only=False)


def run_engine(
    model: Path | str, steps: list[dict[str, Any]], *, sedac: dict[str, Any] | None = None, before: tuple[str, ...] = (), **llm: Any
) -> list[Any]:
    """Start an engine, run the steps (see engine_job.py), return their results; a job is run once in a session, whoever asks."""
    return _run(json.dumps({"llm": {"model": str(model), **llm}, "sedac": sedac, "before": before, "steps": steps}), "tensor_parallel_size" in llm)


def read_heldout_prompts(num_prompts: int) -> list[list[int]]:
    """Prompts of 24 to 80 tokens from files that neither the demo model nor its probes were trained on."""
    from sedac_probes import corpus
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    texts = corpus.cut_prompts(corpus.read_stdlib("heldout"), num_prompts=num_prompts, num_chars=400)
    return [tokenizer(text)["input_ids"][: 24 + i % 57] for i, text in enumerate(texts)]


DRAFTER = {"method": "custom_class", "model": "sedac.engine.drafting.drafter.Drafter", "num_speculative_tokens": 4}
TORCH_DRAFTS = ("refuse_native_drafts",)
"""`before` of an engine whose draft passes shall run in torch, not in the native operator"""


def speculation(**knobs: Any) -> dict[str, Any]:
    """The step that puts a policy with these knobs of `Speculation` into force; lengths are the draft's unless `adaptive` is asked for."""
    return {"do": "apply", "policy": {"speculation": {"adaptive": False, **knobs}}}
