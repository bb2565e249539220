"""The matrix of a benchmark: models, systems and tiers, loads and prompts, each checked before anything is started.

Each pair of a system and a tier is a row of the table, each concurrency or request rate a column. Paths are relative to the directory in
which the command runs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PLAIN = "plain"
"""Name of the system that all others are compared with."""
DEFAULT_TIER = "default"
HELDOUT = "heldout-code"
"""Prompt source: files of Python's standard library that neither the demo model nor its probes have seen."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Model(_Strict):
    """A model to serve, with what SEDAC attaches to it."""

    name: str = Field(min_length=1, max_length=64)
    """Name of the model in tables."""
    directory: Path | None = None
    """Directory of the model. If unset, the demo model, with its own probe set and draft."""
    probe_set: Path | None = None
    """Directory of the probe set. Only the demo model has one of its own."""
    draft: Path | None = None
    """Directory of the draft. If unset, the demo model's own, and none for other models."""
    max_model_len: int = Field(default=512, ge=16)
    """Most tokens of a prompt and its answer together."""

    @model_validator(mode="after")
    def _check_probe_set(self) -> Model:
        if self.directory and not self.probe_set:
            raise ValueError(f"model {self.name!r} has a directory and no probe_set; name its probe set")
        return self


class Tier(_Strict):
    """A tier to ask for, and the policy under which it is asked for."""

    name: str = Field(default=DEFAULT_TIER, min_length=1, max_length=64)
    """Name of the tier, sent with every request. `default` means that none is sent."""
    label: str = ""
    """Name of the row. If empty, the tier's name."""
    disabled: bool = False
    """Whether the policy is disabled while this row is measured, so that every request is exact."""
    policy: dict[str, Any] = Field(default_factory=dict)
    """Knobs of the policy that this row sets before it is measured, by their paths, such as `speculation.enabled`."""

    @property
    def knobs(self) -> dict[str, Any]:
        """The knobs to set, by path."""
        return {**self.policy, **({"enabled": False} if self.disabled else {})}

    @property
    def title(self) -> str:
        """Name of the row within its system."""
        return self.label or ("disabled" if self.disabled else self.name)


class System(_Strict):
    """A server, and the tiers to ask it for."""

    name: str = Field(min_length=1, max_length=64)
    """Name of the system. The one named `plain` is what all others are compared with."""
    kind: Literal["plain", "sedac"]
    """`plain` is vLLM without SEDAC, `sedac` is `sedac serve`."""
    draft: bool = True
    """Whether SEDAC drafts with the model's draft."""
    flags: tuple[str, ...] = ()
    """Flags of vLLM's server."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of the environment to set for this server."""
    tiers: tuple[Tier, ...] = ()
    """Tiers to ask for, each a name or a mapping. Only SEDAC has tiers."""
    models: tuple[str, ...] = ()
    """Names of the models to serve. If empty, all of the matrix."""

    @model_validator(mode="before")
    @classmethod
    def _name_tiers(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("tiers"), list | tuple):
            return {**data, "tiers": [{"name": tier} if isinstance(tier, str) else tier for tier in data["tiers"]]}
        return data

    @model_validator(mode="after")
    def _check_tiers(self) -> System:
        if self.kind == "plain" and self.tiers:
            raise ValueError(f"system {self.name!r} is plain vLLM and has tiers; leave them out or make it `kind: sedac`")
        if (self.name == PLAIN) and self.kind != "plain":
            raise ValueError(f"system {PLAIN!r} is of kind {self.kind!r}; what all others are compared with must be `kind: plain`")
        return self


class Quality(_Strict):
    """How quality is measured; see `sedac.bench.quality`."""

    requests: int = Field(default=16, ge=1)
    """Greedy requests whose answers are compared with plain vLLM's, one after the other."""
    output_tokens: int = Field(default=64, ge=1)
    """Tokens of each of these answers."""
    texts: int = Field(default=8, ge=0)
    """Held-out texts whose perplexity is measured. 0 means none."""
    text_tokens: int = Field(default=256, ge=2)
    """Tokens of each text."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """How requests come."""

    concurrency: int = 0
    """Clients that each send their next request when the last is answered. 0 where requests come at a rate."""
    rate: float = 0.0
    """Requests per second, at random times. 0 where clients wait."""

    @property
    def name(self) -> str:
        """Name of the column."""
        return f"concurrency {self.concurrency}" if self.concurrency else f"{self.rate:g} requests/s"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A system and one of its tiers."""

    system: System
    tier: Tier

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.system.name}, {self.tier.title}" if self.system.tiers else self.system.name


class Matrix(_Strict):
    """Everything that one run measures."""

    name: str = Field(min_length=1, max_length=64)
    """Name of the matrix."""
    about: str = ""
    """A sentence that says what it shows, for the report."""
    models: tuple[Model, ...] = Field(default=(Model(name="demo"),), min_length=1)
    """Models to serve, one after the other."""
    systems: tuple[System, ...] = Field(min_length=1)
    """Servers, all of them running at once and all but one frozen."""
    flags: tuple[str, ...] = ()
    """Flags of vLLM's server that every system gets."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of the environment to set for every server."""
    concurrencies: tuple[int, ...] = (1, 4, 16)
    """Numbers of clients that ask at once."""
    request_rates: tuple[float, ...] = ()
    """Requests per second, at random times."""
    prompts: str = HELDOUT
    """`heldout-code`, or a text file, a .jsonl file with `prompt` or `text` in each line, or a directory of .py files."""
    prompt_tokens: int = Field(default=64, ge=1)
    """Tokens of each prompt."""
    output_tokens: int = Field(default=128, ge=1)
    """Tokens of each answer, which never ends earlier."""
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    """Temperature of sampling. 0 is greedy."""
    requests: int = Field(default=2, ge=1)
    """Requests of each client in one cell."""
    seconds: float = Field(default=0.0, ge=0.0)
    """Seconds for which the clients of a cell begin new requests, in place of a number of requests; for request rates 10 if unset."""
    warmup_rounds: int = Field(default=1, ge=0)
    """Rounds that are run first and count nowhere."""
    rounds: int = Field(default=7, ge=1)
    """Rounds that count; each measures every row at every load once."""
    seed: int = 0
    """Seed of the order of measurements, of arrivals and of sampling."""
    idle_seconds: float = Field(default=10.0, ge=0.0)
    """Seconds over which the processor time of an idle server is measured. 0 means not at all."""
    quality: Quality | None = None
    """How quality is measured. If unset, it is not."""

    @model_validator(mode="after")
    def _check(self) -> Matrix:
        for what, names in (("system", [s.name for s in self.systems]), ("model", [m.name for m in self.models])):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"two {what}s are named {twice[0]!r}; give each a name of its own")
        if self.systems[0].name != PLAIN or self.systems[0].models:
            raise ValueError(f"the first system is {self.systems[0].name!r}; begin with `- {{name: {PLAIN}, kind: plain}}`, for all models")
        if not (self.concurrencies or self.request_rates):
            raise ValueError("there are neither concurrencies nor request_rates; give at least one, such as `concurrencies: [1, 4]`")
        if wrong := [value for value in (*self.concurrencies, *self.request_rates) if value <= 0]:
            raise ValueError(f"a load of {wrong[0]} is not above 0; give at least one client, or a positive rate")
        for system in self.systems:
            titles = [tier.title for tier in system.tiers]
            if twice := sorted({title for title in titles if titles.count(title) > 1}):
                raise ValueError(f"system {system.name!r} has two tiers {twice[0]!r}; give one of them a `label`")
            if unknown := [name for name in system.models if name not in [m.name for m in self.models]]:
                raise ValueError(f"system {system.name!r} names model {unknown[0]!r}; known: {', '.join(m.name for m in self.models)}")
        for model in self.models:
            if self.prompt_tokens + self.output_tokens > model.max_model_len:
                total = f"prompt_tokens {self.prompt_tokens} + output_tokens {self.output_tokens}"
                raise ValueError(f"{total} are more than max_model_len {model.max_model_len} of {model.name!r}; give fewer, or raise max_model_len")
        return self

    @property
    def loads(self) -> tuple[Load, ...]:
        """The columns."""
        return (*(Load(concurrency=n) for n in self.concurrencies), *(Load(rate=rate) for rate in self.request_rates))

    def get_systems(self, model: Model) -> tuple[System, ...]:
        """Return the systems that serve a model."""
        return tuple(system for system in self.systems if not system.models or model.name in system.models)

    def get_rows(self, model: Model) -> tuple[Row, ...]:
        """Return the rows of a model."""
        return tuple(Row(system=system, tier=tier) for system in self.get_systems(model) for tier in system.tiers or (Tier(),))

    def get_digest(self) -> str:
        """Return a digest of everything that decides a figure: all but the name and the text of the report."""
        content = self.model_dump(mode="json", exclude={"name", "about"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
