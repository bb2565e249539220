"""The bench on which reduced drafts are judged: answers, levels, the reference and the engine. Called by `make_reduced_draft`.

Everything that is measured is kept in the work directory and read back, so a run that was stopped goes on where it was; the directory
refuses other settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from sedac.errors import ConfigError
from sedac.policy.model import FULL, MAX_DRAFT_TOKENS
from sedac.policy.weights import get_weights_digest
from sedac.probe import artifact
from sedac.probe.draft import REDUCED, DraftManifest, save_draft
from sedac.probe.manifest import LevelRecord
from torch import Tensor
from tqdm import tqdm

from sedac_probes.calibration.forms import AtLevel
from sedac_probes.calibration.reduced import Form, Plain, ReducedModel
from sedac_probes.certification.prompts import cut_requests
from sedac_probes.collecting.recording import read_config
from sedac_probes.corpus import Document
from sedac_probes.drafts.candidates import POSITIONS
from sedac_probes.drafts.costs import PartCosts, estimate_costs, measure_costs, read_costs, write_costs
from sedac_probes.drafts.left_out import LeftOut, WithoutParts
from sedac_probes.drafts.search import Judged
from sedac_probes.drafts.trial import Job, Trial, from_dict, run_trial
from sedac_probes.drafts.windows import Agreement, Windows, answer

SEARCH, CHECK = "search", "check"
"""Names of the answers that the search measures with, and of those kept aside."""


_NUM_TIMED, _TIMED_LENGTHS = 4, (1, 2, 4)
"""Number of prompts, and drafts per step, of engines that only measure costs."""
ROW_SHARE = 0.05
"""Share of a plain step that a verified row costs where no engine is started."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to calibrate."""

    num_prompts: int = 24
    """Number of prompts to search with."""
    num_heldout: int = 24
    """Number of prompts kept aside. The engine answers them too."""
    prompt_tokens: int = 64
    answer_tokens: int = 64
    """Tokens of the answers to search with."""
    check_tokens: int = 128
    """Tokens of the answers kept aside."""
    max_tokens: int = 8
    """Limit of drafts per step."""
    max_trials: int = 300
    """Limit of drafts that the search measures."""
    dtype: str = "auto"
    is_eager: bool = False
    is_measured: bool = True
    """Whether engines are started to measure costs and the draft that was found."""
    seed: int = 0
    """Seed of the choice of prompts."""

    def check(self) -> None:
        """Raise ConfigError where a value is out of range."""
        for name in ("num_prompts", "num_heldout", "prompt_tokens", "max_trials"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")
        if not POSITIONS <= self.max_tokens <= MAX_DRAFT_TOKENS:
            raise ConfigError(f"max_tokens is {self.max_tokens}; give {POSITIONS} to {MAX_DRAFT_TOKENS}")
        if (shortest := min(self.answer_tokens, self.check_tokens)) < self.max_tokens + 2:
            raise ConfigError(f"answers have {shortest} tokens; {self.max_tokens} drafts per step need at least {self.max_tokens + 2}")


class Bench:
    """Measures drafts of one model, and keeps what it measured in a directory.

    Raises:
        ConfigError: the directory holds measurements made with other settings, or a level is unknown.
    """

    def __init__(
        self, model: str, probe_set: Path | None, documents: Sequence[Document], heldout: Sequence[Document], work: Path, settings: Settings
    ) -> None:
        settings.check()
        work.mkdir(parents=True, exist_ok=True)
        self.model_dir, self.probe_set, self.work, self.settings = model, probe_set, work, settings
        self.model = ReducedModel(model)
        self.num_layers = self.model.num_layers
        known = artifact.load(probe_set) if probe_set else None
        self.levels: tuple[LevelRecord, ...] = known.manifest.levels if known else ()
        self._forms: dict[str, Form] = {FULL: Plain()}
        if known:
            score: Any = known.manifest.score
            self._forms |= {level.name: AtLevel(level, known.neurons, self.model.activation, score) for level in known.levels}
        lengths = {SEARCH: settings.answer_tokens, CHECK: settings.check_tokens}
        self.prompts = {SEARCH: self._cut(documents, settings.num_prompts), CHECK: self._cut(heldout, settings.num_heldout)}
        self.data_digest = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        decides = {
            "weights": get_weights_digest(model),
            "probe_set": known.manifest.sha256 if known else "",
            "data": self.data_digest,
            "answer_tokens": lengths,
            "max_tokens": settings.max_tokens,
        }
        _check_same(work, decides)
        self.windows = {
            name: Windows(self.model, self._answer(name, length), settings.prompt_tokens, settings.max_tokens) for name, length in lengths.items()
        }
        self._kept = work / "judged.jsonl"
        self._judged = {j.left_out: j for j in _read_lines(self._kept)}

    def _cut(self, documents: Sequence[Document], count: int) -> list[list[int]]:
        s = self.settings
        return [r.prompt for r in cut_requests(documents, self.model.tokenizer, num_requests=count, num_tokens=s.prompt_tokens, seed=s.seed)]

    def _answer(self, name: str, num_tokens: int) -> Tensor:
        path = self.work / f"answers-{name}.safetensors"
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            save_file({"ids": answer(self.model, self.prompts[name], num_tokens)}, temporary)
            temporary.rename(path)
        return load_file(path)["ids"]

    def make_form(self, left_out: LeftOut) -> WithoutParts:
        """Return the form of a draft.

        Raises:
            ConfigError: the probe set has no such level, or the model no such layer.
        """
        if left_out.level not in self._forms:
            raise ConfigError(f"level {left_out.level!r} is unknown; probe set {self.probe_set} has {', '.join(self._forms)}")
        if outside := sorted({layer for layer in (*left_out.attention, *left_out.mlp) if not 0 <= layer < self.num_layers}):
            raise ConfigError(f"layers {outside} can't be left out; the model has layers 0 to {self.num_layers - 1}")
        return WithoutParts(left_out, self._forms[left_out.level])

    def judge(self, left_out: LeftOut) -> Judged:
        """Return a draft's acceptance on the answers to search with, measured once and kept."""
        if left_out not in self._judged:
            judged = Judged.from_agreement(left_out, self.windows[SEARCH].measure(self.make_form(left_out)))
            with self._kept.open("a") as file:
                file.write(json.dumps(judged.to_dict()) + "\n")
            self._judged[left_out] = judged
        return self._judged[left_out]

    def check(self, left_out: LeftOut) -> Agreement:
        """Return a draft's agreement on the answers kept aside."""
        return self.windows[CHECK].measure(self.make_form(left_out))

    def make_manifest(self, left_out: LeftOut, name: str, **more: Any) -> DraftManifest:
        """Return the manifest of a draft."""
        return DraftManifest(
            name=name, kind=REDUCED, model=Path(self.model_dir).name, hidden_size=self.model.hidden_size, num_layers=self.num_layers,
            depth=self.num_layers, skip_attention=left_out.attention, skip_mlp=left_out.mlp, level=left_out.level, **more,
        )  # fmt: skip

    def run_engine(self, left_out: LeftOut, lengths: Sequence[int], *, min_confidence: float = 0.0, num_prompts: int, num_rounds: int) -> Trial:
        """Try a draft in the engine that will serve, on prompts kept aside; a trial that was made before is read back."""
        s = self.settings
        limits = {"lengths": list(lengths), "min_confidence": min_confidence}
        settings: dict[str, Any] = limits | {"num_rounds": num_rounds, "dtype": s.dtype, "is_eager": s.is_eager}
        text = json.dumps([left_out.to_dict(), settings, num_prompts])
        directory = self.work / "trials" / hashlib.sha256(text.encode()).hexdigest()[:16]
        path = directory / "trial.json"
        if not path.exists():
            save_draft(directory, self.make_manifest(left_out, "trial", max_tokens=max(lengths), min_confidence=min_confidence), None)
            job = Job(
                model=self.model_dir, draft=str(directory.resolve()), probe_set=str(self.probe_set.resolve()) if self.probe_set else "",
                prompts=self.prompts[CHECK][:num_prompts], num_tokens=s.check_tokens, **settings,
            )  # fmt: skip
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(asdict(run_trial(job)), indent=1) + "\n")
            temporary.rename(path)
        return from_dict(json.loads(path.read_text()))

    def get_costs(self) -> PartCosts:
        """Return the costs in costs.json, where they are kept once measured in the engine; estimated ones where no engine may be started.

        Raises:
            ConfigError: the file is malformed.
        """
        path = self.work / "costs.json"
        if not path.exists() and not self.settings.is_measured:
            return estimate_costs(read_config(self.model_dir), self.levels, ROW_SHARE)
        if not path.exists():
            with tqdm(total=4 + len({level.reduction for level in self.levels}), desc="costs, measured in the engine", unit="engine") as bar:

                def run(left_out: LeftOut) -> Trial:
                    """Run one engine that measures costs."""
                    trial = self.run_engine(left_out, _TIMED_LENGTHS, num_prompts=_NUM_TIMED, num_rounds=2)
                    bar.update()
                    return trial

                write_costs(path, measure_costs(run, self.num_layers, self.levels))
        return read_costs(path, [FULL, *(level.name for level in self.levels)])


def _check_same(work: Path, decides: dict[str, Any]) -> None:
    path, text = work / "settings.json", json.dumps(decides, indent=1) + "\n"
    if path.exists() and path.read_text() != text:
        raise ConfigError(f"{work} holds measurements made with other settings; remove it, or name another directory")
    path.write_text(text)


def _read_lines(path: Path) -> list[Judged]:
    """Read what was measured before; a line that a stopped run left half-written is measured again."""
    found = []
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text + "\n")
    for line in text.splitlines():
        try:
            found.append(Judged.from_dict(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            continue
    return found
