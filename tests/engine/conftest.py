"""Real vLLM engines on the demo model and on tiny random ones, one process each."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "probes" / "demo"


class EngineFailed(Exception):
    """The engine's process ended with an error; carries its output."""


@functools.cache
def _run(job: str) -> list[Any]:
    with tempfile.TemporaryDirectory() as directory:
        job_path, result_path = Path(directory) / "job.json", Path(directory) / "result.pt"
        job_path.write_text(job)
        command = [sys.executable, str(Path(__file__).with_name("engine_job.py")), str(job_path), str(result_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=directory)
        if done.returncode:
            raise EngineFailed(done.stdout + done.stderr)
        return torch.load(result_path, weights_only=False)


def run_engine(model: Path | str, steps: list[dict[str, Any]], *, sedac: dict[str, Any] | None = None, **llm: Any) -> list[Any]:
    """Start an engine, run the steps (see engine_job.py), return their results; same job, same process result."""
    return _run(json.dumps({"llm": {"model": str(model), **llm}, "sedac": sedac, "steps": steps}))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return DEMO / "model"


@pytest.fixture(scope="session")
def demo_probes() -> Path:
    return DEMO / "probe-set"


@pytest.fixture(scope="session")
def heldout_prompts(demo_model: Path) -> list[list[int]]:
    """64 prompts of 24 to 80 tokens from files that neither the model nor the probes were trained on."""
    from sedac_probes import corpus
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    texts = corpus.cut_prompts(corpus.read_stdlib("heldout"), num_prompts=64, num_chars=400)
    return [tokenizer(text)["input_ids"][: 24 + i % 57] for i, text in enumerate(texts)]
