"""One engine of benchmarks/cuda/engine.py, in a process of its own: reads orders on stdin, one JSON object a line, and answers on stdout.

The engine runs in this very process, so that steps are timed where they are called. Whatever is timed holds a lock on a file that all
engines share. An order that fails is answered with its error; the next one is read.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
_MAX_REPORTS = 8


class Engine:
    """An engine and what it can be told."""

    def __init__(self, options: dict[str, Any], lock: str) -> None:
        started = time.perf_counter()
        self._lock, self._is_ours, self._revision, self._number = lock, "worker_cls" in options, 0, 0
        from vllm import LLM

        self._import_seconds = time.perf_counter() - started
        self.llm = LLM(**options)
        self._seconds = time.perf_counter() - started
        self._warm: set[tuple[Any, ...]] = set()
        self._policy: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        """Return what the engine is and decided by itself, and how long it took to start (seconds)."""
        import torch
        import vllm

        config = self.llm.llm_engine.vllm_config
        mode = config.compilation_config.cudagraph_mode
        has_gpu = torch.cuda.is_available()
        found = {
            "import seconds": self._import_seconds, "start seconds": self._seconds, "vllm": vllm.__version__, "torch": torch.__version__,
            "runner": "V2" if config.use_v2_model_runner else "V1", "cudagraph_mode": getattr(mode, "name", str(mode)),
            "async": bool(config.scheduler_config.async_scheduling), "device": torch.cuda.get_device_name() if has_gpu else "CPU",
            "GiB": torch.cuda.memory_reserved() / 2**30 if has_gpu else None,
        }  # fmt: skip
        if self._is_ours and has_gpu:
            found["if_nodes"] = check_if_nodes()
        return found

    def generate(self, texts: list[str], num_tokens: int, policy: dict[str, Any], tier: str = "") -> dict[str, Any]:
        """Answer all texts at once, greedily; tokens and their log-probabilities by text, and what SEDAC says they were computed with."""
        from vllm import SamplingParams

        self._apply(policy)
        extra = {"sedac_tier": tier or policy.get("default_tier", "exact")}
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=0, detokenize=False, extra_args=extra)
        outputs = self.llm.generate(texts, params, use_tqdm=False)
        answers = []
        for output in outputs:
            (completion,) = output.outputs
            tokens = list(completion.token_ids)
            logprobs = [step[t].logprob for step, t in zip(completion.logprobs, tokens, strict=True)]
            share = self._get_share({output.request_id: len(output.prompt_token_ids)})
            answers.append({"tokens": tokens, "logprobs": logprobs, "mlp_share": share})
        return {"answers": answers}

    def calibrate(self, share: float, num_tokens: int, policy: dict[str, Any]) -> dict[str, Any]:
        """Measure gates in one pass over `num_tokens` tokens and set the contextual thresholds (engine_worker.py).

        The policy must decide about prompts, and let nothing exit.
        """
        self._apply(policy)
        self.llm.collective_rpc("bench_record")
        self._run_wave([num_tokens], 2, policy["default_tier"])
        return self.llm.collective_rpc("bench_set_thresholds", args=(share,))[0]

    def measure(self, batch: int, num_prompt: int, num_tokens: int, policy: dict[str, Any], tier: str = "") -> dict[str, Any]:
        """Time the decode steps of `batch` requests that started together; see `_run_wave`."""
        self._apply(policy)
        key = (batch, json.dumps(policy), tier)
        with self._hold():
            if key not in self._warm:
                self._run_wave([num_prompt] * batch, 4, tier)
                self._warm.add(key)
            return self._run_wave([num_prompt] * batch, num_tokens, tier)

    def _run_wave(self, lengths: list[int], num_tokens: int, tier: str) -> dict[str, Any]:
        """Generate from random prompts of these lengths until one request has `num_tokens`, and time what comes after every one's first token.

        Prefill is left out: the clock starts with the step that brought the last first token. `ms` is per step that brought tokens.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, extra = self.llm.llm_engine, {"sedac_tier": tier} if tier else None  # none on vLLM without SEDAC
        params = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA, extra_args=extra
        )
        vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self._number += 1
        ours: dict[str, int] = {}
        waiting = set()
        for i, length in enumerate(lengths):
            name = f"{self._number}-{i}"
            prompt = [(7919 * i + 104729 * t + 31 * self._number) % (vocabulary - 2) + 1 for t in range(length)]
            ours[engine.add_request(name, {"prompt_token_ids": prompt}, params)] = length
            waiting.add(name)
        start = last = 0.0
        steps, total, finished = [], 0, False
        while not finished:
            outputs = [o for o in engine.step() if o.outputs[0].token_ids]
            if not outputs:
                continue
            now = time.perf_counter()
            if start:
                steps.append(now - last)
                total += sum(len(o.outputs[0].token_ids) for o in outputs)
            waiting -= {o.request_id for o in outputs}
            finished = any(o.finished for o in outputs)
            if not waiting and not start:
                start = now
            last = now
        while engine.has_unfinished_requests():
            engine.step()
        if not steps:
            raise RuntimeError(f"{num_tokens} tokens are too few: the first request had finished before the last one began")
        seconds = last - start
        return {
            "ms": 1e3 * seconds / len(steps), "tokens/s": total / seconds, "steps": len(steps), "tokens": total,
            "step ms": [round(1e3 * s, 4) for s in steps], "mlp_share": self._get_share(ours),
        }  # fmt: skip

    def _apply(self, policy: dict[str, Any]) -> None:
        if not self._is_ours or policy == self._policy:
            return
        self._revision += 1
        (answer,) = self.llm.collective_rpc("sedac_apply", args=(policy, self._revision))
        if answer["violations"]:
            raise ValueError(f"the policy was refused: {answer['violations']}")
        self._policy = policy

    def _get_share(self, prompts: dict[str, int]) -> float | None:
        """Return the mean share of the MLPs that generated tokens were computed with, by prompt length of each request; None without SEDAC.

        Prompts run in full. A request's last token is never computed with.
        """
        if not self._is_ours:
            return None
        shares = []
        for name, length in list(prompts.items())[:_MAX_REPORTS]:
            (report,) = self.llm.collective_rpc("sedac_get_report", args=(name,))
            if report is not None and report["num_tokens"] > length:
                shares.append(1 - (1 - report["mlp_share"]) * report["num_tokens"] / (report["num_tokens"] - length))
        return sum(shares) / len(shares) if shares else None

    @contextlib.contextmanager
    def _hold(self) -> Iterator[None]:
        """Hold the lock that all engines take for whatever is timed."""
        with open(self._lock, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def check_if_nodes() -> str:
    """Say whether CUDA graphs' IF nodes work here, or why not."""
    try:
        from sedac.engine.backends.cuda import if_nodes

        return if_nodes.check() or "work"
    except Exception as error:  # noqa: BLE001  the engine has started and knows what it does; this only reports
        return f"{type(error).__name__}: {error}"


def main() -> None:
    """Start the engine, then serve orders until stdin ends."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the parent asks for the stacks of an engine that hangs
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is no answer
    order = json.loads(Path(sys.argv[1]).read_text())
    engine = Engine(order["llm"], order["lock"])
    print(json.dumps(engine.describe()), file=answers)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(engine, order.pop("do"))(**order)
        except Exception as error:  # noqa: BLE001  whatever vLLM raises, the next order may succeed
            _log.exception("an order failed")
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:600]}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
