"""A trial: the same requests answered by the engine that will serve, exactly and by members of a family. Called by `certify`.

What a finished member answered is kept on disk, so a run that was stopped goes on after the last finished one. The kept answers
depend on everything that decides them and on nothing else: the losses are computed from them anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sedac import __version__
from sedac.errors import ConfigError
from sedac.policy.model import EXACT, Policy
from sedac.policy.request_keys import TIER_KEY
from sedac.versions import find_vllm_version
from tqdm import tqdm

from sedac_probes.certification.prompts import Request
from sedac_probes.collecting.recording import LLM

_MakeParams = Callable[[str, int], Any]
"""Makes SamplingParams of the tier and the index of a request."""
_GROUP = 64  # requests handed to the engine at a time; a progress bar's step
_ALONE = 16  # requests by which the saving is measured


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one tier answered."""

    tokens: list[list[int]]
    """Token ids, per request."""
    saved: float
    """Share of the MLP FLOPs of generated tokens saved, of requests that have the engine for themselves. Prompts run in full."""
    gaps: list[list[float]] | None
    """Gaps per request, see `losses.Exchange`. None where not scored."""


class Trial:
    """One engine, one set of requests; see the module's docstring."""

    def __init__(self, llm: LLM, requests: Sequence[Request], *, num_tokens: int, temperature: float, seed: int) -> None:
        config = llm.llm_engine.vllm_config
        assert not config.cache_config.enable_prefix_caching, "an exact answer must not read KV that a bounded one wrote"
        self._llm, self._requests = llm, requests
        self._num_layers = llm.collective_rpc("sedac_describe")[0]["num_layers"]
        self._num_tokens, self._temperature, self._seed = num_tokens, temperature, seed
        self._revision = 0

    def answer(self, policy: Policy, tier: str, *, scored: bool, label: str) -> Answers:
        """Answer every request under one tier of a policy, free-running, and score the answers by the full model where `scored`.

        Greedy, or drawn at the temperature with a seed of each request's own, the same under every tier. Every token is computed at its
        very level, the most that serving may take from it.
        """
        self._revision += 1
        for worker in self._llm.collective_rpc("sedac_apply", args=(replace(policy, strict=True).to_dict(), self._revision)):
            assert not worker["violations"], worker
        prompts = [r.prompt for r in self._requests]
        tokens = [list(output.outputs[0].token_ids) for output in self._generate(prompts, self._make_params, tier, f"{label}: answers")]
        saved = self._measure_saving(prompts[:_ALONE], tier)
        return Answers(tokens=tokens, saved=saved, gaps=self.score(tokens, label) if scored else None)

    def _measure_saving(self, prompts: Sequence[list[int]], tier: str) -> float:
        """Answer requests one by one and read the workers' counters: in larger batches neurons chosen per token are computed and masked."""
        before = self._llm.collective_rpc("sedac_get_stats")[0]
        for i, prompt in enumerate(prompts):
            self._llm.generate([{"prompt_token_ids": prompt}], self._make_params(tier, i), use_tqdm=False)
        after = self._llm.collective_rpc("sedac_get_stats")[0]
        blocks = (after["num_decode_tokens"] - before["num_decode_tokens"]) * self._num_layers
        skipped = after["num_mlp_blocks_skipped"] - before["num_mlp_blocks_skipped"]
        return float(skipped / blocks) if blocks else 0.0

    def score(self, answers: Sequence[list[int]], label: str) -> list[list[float]]:
        """Return the gaps of answers, prompt and answer read once by the full model."""
        from vllm import SamplingParams

        def make(tier: str, index: int) -> Any:
            """Return parameters that ask for the log-probabilities of the prompt's tokens."""
            return SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False, extra_args={TIER_KEY: tier})

        def read(output: Any) -> list[float]:
            """Return the gap of every token of the answer, in nats."""
            found = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[len(self._requests[0].prompt) :]
            return [max(c.logprob for c in candidates.values()) - candidates[token].logprob for token, candidates in found]

        texts = [r.prompt + answer for r, answer in zip(self._requests, answers, strict=True)]
        return [read(output) for output in self._generate(texts, make, EXACT, f"{label}: full model's choices")]

    def _generate(self, prompts: Sequence[list[int]], make: _MakeParams, tier: str, label: str) -> Iterator[Any]:
        with tqdm(total=len(prompts), desc=label, unit="request", leave=False) as bar:
            for start in range(0, len(prompts), _GROUP):
                group = prompts[start : start + _GROUP]
                params = [make(tier, start + i) for i in range(len(group))]
                yield from self._llm.generate([{"prompt_token_ids": p} for p in group], params, use_tqdm=False)
                bar.update(len(group))

    def _make_params(self, tier: str, index: int) -> Any:
        from vllm import SamplingParams

        seed = self._seed + index if self._temperature else None
        return SamplingParams(max_tokens=self._num_tokens, temperature=self._temperature, seed=seed, detokenize=False, extra_args={TIER_KEY: tier})


class KeptTrial:
    """A trial whose finished members lie in a directory named by all that decides them."""

    def __init__(self, trial: Trial, directory: Path, settings: dict[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True)
        self._trial, self._directory = trial, directory / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / "settings.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

    def answer(self, policy: Policy, tier: str, *, key: str, scored: bool, label: str) -> Answers:
        """Return what was kept under `key`, or answer and keep it.

        Raises:
            ConfigError: a kept file can't be read.
        """
        path = self._directory / f"{key}.json"
        answers = _read(path) if path.exists() else None
        if answers is None:
            answers = self._trial.answer(policy, tier, scored=scored, label=label)
        elif scored and answers.gaps is None:
            answers = Answers(tokens=answers.tokens, saved=answers.saved, gaps=self._trial.score(answers.tokens, label))
        else:
            return answers
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(answers)))
        temporary.rename(path)
        return answers


def _read(path: Path) -> Answers:
    try:
        return Answers(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} can't be read ({error}); remove it, and its member is run again") from error


def describe_engine(llm: LLM) -> str:
    """Name what computes: versions, device and dtype."""
    config = llm.llm_engine.vllm_config
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    versions = f"vllm {find_vllm_version()}, sedac {__version__}"
    return f"{versions}, {config.device_config.device_type}, {dtype}"
