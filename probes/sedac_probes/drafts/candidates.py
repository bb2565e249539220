"""Candidates: what was asked for, the drafts that were made of it, how good each is, and the one that is shipped.

Everything lies under the job's work directory: `drafts/<name>` holds a candidate's artifact and its result.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sedac_probes.corpus import Document
from sedac_probes.drafts.acceptance import Proposal, StepCosts
from sedac_probes.drafts.fit import FitSettings

POSITIONS = 4
"""Draft tokens whose acceptance the table shows, and that the engine is measured with."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What was asked for."""

    model: str
    work: Path
    documents: Sequence[Document]
    heldout: Sequence[Document]
    record: tuple[int, ...] = ()
    """Depths to record beside those of this run, for later runs."""
    samples: int = 1024
    heldout_samples: int = 128
    own_share: float = 0.5
    max_length: int = 512
    neurons: int = 0
    dtype: str = "auto"
    settings: FitSettings = field(default_factory=FitSettings)
    probe_set: Path | None = None
    """Probe set whose levels a reduced draft may use."""
    is_measured: bool = True
    is_eager: bool = False


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A draft in a directory of its own, and how good it is; kept there as result.json."""

    name: str
    kind: str
    depth: int
    num_parameters: int
    acceptance: tuple[float, ...]
    """Share of the draft tokens at each position that are accepted when those before were, on held-out texts."""
    tokens_per_step: float
    """Output tokens of a step with POSITIONS draft tokens in every step."""
    costs: StepCosts
    is_measured: bool
    """Whether costs were measured in the engine, not estimated from parameters."""
    predicted: float
    """Speed-up by the cost model with POSITIONS draft tokens in every step."""
    proposal: Proposal
    heldout_loss: float | None = None
    """Soft cross-entropy to the full model on held-out texts, in nats per token."""
    losses: tuple[tuple[int, float], ...] = ()
    """Held-out losses by step. At 0 it is that of the model's early exit without any training."""
    measured: float | None = None
    """Measured speed-up of the same in the engine, at batch 1."""
    measured_acceptance: tuple[float, ...] = ()
    """Acceptance in the engine, on fewer of the texts."""

    @property
    def draft_share(self) -> float:
        """Cost of a draft pass in plain steps."""
        return self.costs.draft_pass / self.costs.plain


def write_candidate(directory: Path, candidate: Candidate) -> None:
    """Put a candidate into the table, beside its artifact."""
    (directory / "result.json").write_text(json.dumps(asdict(candidate), indent=1) + "\n")


def read_candidates(work: Path) -> list[Candidate]:
    """Return the candidates of all runs, in order of predicted speed-up."""
    found = [read_candidate(path) for path in sorted((work / "drafts").glob("*/result.json"))]
    return sorted(found, key=lambda candidate: -candidate.proposal.speedup)


def read_candidate(path: Path) -> Candidate:
    """Read a result.json."""
    fields: dict[str, Any] = json.loads(path.read_text())
    fields |= {"costs": StepCosts(**fields["costs"]), "proposal": Proposal(**fields["proposal"])}
    fields |= {name: tuple(fields[name]) for name in ("acceptance", "measured_acceptance")}
    fields["losses"] = tuple((step, loss) for step, loss in fields["losses"])
    return Candidate(**fields)


def ship(work: Path, name: str, out: Path) -> None:
    """Copy a candidate's artifact to where it is served from."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)  # readers take the manifest for the sign that a draft is there: it comes last
    for path in ("head.safetensors", "manifest.json"):
        source = work / "drafts" / name / path
        if source.exists():
            shutil.copyfile(source, out / path)
