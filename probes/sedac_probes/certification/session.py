"""A session of certification: what is to be shown, and an engine with the requests on which it is shown. Called by `certify`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sedac.errors import ConfigError
from sedac.policy.digest import get_knobs_digest
from sedac.policy.model import EXACT, Policy
from sedac.policy.weights import get_weights_digest
from sedac.probe.manifest import read_manifest

from sedac_probes.certification import prompts
from sedac_probes.certification.bounds import Procedure
from sedac_probes.certification.losses import Exchange, Loss, load_loss
from sedac_probes.certification.trial import Answers, KeptTrial, Trial, describe_engine
from sedac_probes.collecting.recording import LLM, start_engine
from sedac_probes.corpus import Document


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is to be shown, and on which requests."""

    loss: str = "mismatch"
    """Name of the loss, see `losses.load_loss`."""
    eps: float = 0.05
    """Limit of the mean loss, over 0 to below 1."""
    delta: float = 0.05
    """Share of runs that may be wrong, over 0 to below 1."""
    procedure: Procedure = "wsr"
    num_requests: int = 500
    prompt_tokens: int = 64
    """Tokens of every prompt."""
    answer_tokens: int = 32
    """Limit of tokens of an answer."""
    temperature: float = 0.0
    """Temperature of the answers. 0 means greedy."""
    seed: int = 0
    """Seed of the choice of prompts, their order and, at a temperature, the draws."""

    def check(self, model: str) -> None:
        """Raise ConfigError where a value is out of range or too long for the model."""
        for name, value in (("--eps", self.eps), ("--delta", self.delta)):
            if not 0 < value < 1:
                raise ConfigError(f"{name} is {value}; give a number over 0 and below 1, such as 0.05")
        counts = (("--requests", self.num_requests), ("--prompt-tokens", self.prompt_tokens), ("--tokens", self.answer_tokens))
        for name, count in counts:
            if count < 1:
                raise ConfigError(f"{name} is {count}; give at least 1")
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"--temperature is {self.temperature}; give 0 (greedy) to 2")
        config = Path(model) / "config.json"
        limit = json.loads(config.read_text()).get("max_position_embeddings") if config.is_file() else None
        if limit and self.max_length > limit:
            raise ConfigError(f"--prompt-tokens {self.prompt_tokens} and --tokens {self.answer_tokens} exceed the model's {limit} tokens; lower one")

    @property
    def max_length(self) -> int:
        """Tokens that the engine must hold per request: prompt, answer, and the one more that vLLM generates when it scores both."""
        return self.prompt_tokens + self.answer_tokens + 1


class Session:
    """An engine with the requests of one certification or check, answered exactly once."""

    def __init__(self, model: str, probe_set: Path, documents: Sequence[Document], settings: Settings, kept: Path) -> None:
        settings.check(model)
        load_loss(settings.loss, str, temperature=settings.temperature)  # refuses an unknown one before the engine starts
        self.settings, self.manifest = settings, read_manifest(probe_set)
        self.llm: LLM = start_engine(model, probe_set=probe_set, max_length=settings.max_length)
        tokenizer = self.llm.get_tokenizer()
        count, length = settings.num_requests, settings.prompt_tokens
        self.requests = prompts.cut_requests(documents, tokenizer, num_requests=count, num_tokens=length, seed=settings.seed)
        self.loss: Loss = load_loss(settings.loss, tokenizer.decode, temperature=settings.temperature)
        self.engine, self.weights_sha256, self.data_sha256 = describe_engine(self.llm), get_weights_digest(model), prompts.get_digest(self.requests)
        trial = Trial(self.llm, self.requests, num_tokens=settings.answer_tokens, temperature=settings.temperature, seed=settings.seed)
        decides = {
            "engine": self.engine,
            "weights": self.weights_sha256,
            "probe_set": self.manifest.sha256,
            "data": self.data_sha256,
            "num_tokens": settings.answer_tokens,
            "temperature": settings.temperature,
            "seed": settings.seed,
        }
        self._kept = KeptTrial(trial, kept, decides)
        self.exact = self._kept.answer(Policy(), EXACT, key=EXACT, scored=self.loss.needs_gaps, label=EXACT)

    @property
    def num_documents(self) -> int:
        """Documents that the requests are from."""
        return len({r.document for r in self.requests})

    def get_exact_loss(self) -> float:
        """Return the loss of the exact answers, as if they were bounded ones."""
        losses = self._compare(self.exact)
        return sum(losses) / len(losses)

    def answer(self, policy: Policy, tier: str, label: str) -> tuple[list[float], float]:
        """Return every request's loss under a tier, and the saved share of MLP FLOPs."""
        answers = self._kept.answer(policy, tier, key=get_knobs_digest(policy, tier)[:16], scored=self.loss.needs_gaps, label=label)
        return self._compare(answers), answers.saved

    def _compare(self, answers: Answers) -> list[float]:
        gaps = answers.gaps or [[] for _ in answers.tokens]
        parts = zip(self.requests, self.exact.tokens, answers.tokens, gaps, strict=True)
        return self.loss.compute_all([Exchange(prompt=r.prompt, exact=e, bounded=b, gaps=g) for r, e, b, g in parts])
