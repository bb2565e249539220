"""Make a reduced draft: the whole model with parts left out, found by calibration, without training. Called by `distill`.

In order: greedy answers of the full model to prompts cut from the texts; costs of the parts, measured in the engine that will serve; the
search; the draft that it found on answers kept aside, by the reference and in the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sedac.probe.draft import DraftManifest, save_draft
from tqdm import tqdm

from sedac_probes.corpus import Document
from sedac_probes.drafts.acceptance import Rollout
from sedac_probes.drafts.bench import Bench, Settings
from sedac_probes.drafts.candidates import POSITIONS
from sedac_probes.drafts.costs import PartCosts
from sedac_probes.drafts.left_out import LeftOut
from sedac_probes.drafts.search import Found, Judged, Search
from sedac_probes.drafts.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Made:
    """A draft and how good it is."""

    manifest: DraftManifest
    costs: PartCosts
    found: Found
    fixed: Rollout
    """Steps that generate the answers kept aside with POSITIONS drafts in each, by the reference in fp32."""
    rollout: Rollout
    """The same at the limits that were chosen."""
    fixed_trial: Trial | None
    """Trial with POSITIONS drafts in every step, in the engine, on the same prompts. None where no engine was asked for."""
    trial: Trial | None
    """The same at the limits that were chosen."""

    @property
    def predicted(self) -> float:
        """Speed-up by the cost model, of the rollout."""
        return self.found.best.costs.predict(self.rollout)


def make_reduced_draft(
    model: str,
    documents: Sequence[Document],
    heldout: Sequence[Document],
    out: Path,
    *,
    work: Path,
    probe_set: Path | None = None,
    name: str = "reduced",
    settings: Settings = Settings(),  # noqa: B008 (frozen)
) -> Made:
    """Find what to leave out, write the draft to `out`, and return it with everything that was seen.

    `documents` are searched with and `heldout` judge; the levels of `probe_set` are tried too. Costs are read from work/costs.json where it is
    there.

    Raises:
        ConfigError: a setting is out of range, the texts are too few, or the work directory is another's.
    """
    bench = Bench(model, probe_set, documents, heldout, work, settings)
    costs = bench.get_costs()
    with tqdm(total=settings.max_trials, desc="drafts tried", unit="draft") as bar:
        levels = [level.name for level in bench.levels]
        found = Search(_count(bench.judge, bar), costs, bench.num_layers, levels, settings.max_trials).run()
    best, limits = found.best, found.best.proposal
    agreement = bench.check(best.left_out)
    fixed, rollout = (agreement.roll_out(*pair) for pair in ((POSITIONS, 0.0), (limits.max_tokens, limits.min_confidence)))
    fixed_trial = trial = None
    if settings.is_measured:
        count = settings.num_heldout
        fixed_trial = bench.run_engine(best.left_out, (POSITIONS,), num_prompts=count, num_rounds=1)
        trial = bench.run_engine(best.left_out, (limits.max_tokens,), min_confidence=limits.min_confidence, num_prompts=count, num_rounds=1)
    training = {
        "method": "parts left out by calibration, without training",
        "data_digest": bench.data_digest,
        "num_prompts": settings.num_prompts,
        "prompt_tokens": settings.prompt_tokens,
        "answer_tokens": settings.answer_tokens,
        "num_tried": len(found.tried),
        "costs": asdict(costs),
        "pass_share": best.costs.draft_pass / costs.plain,
        "predicted_speedup": best.costs.predict(rollout),
        "tokens_per_step": rollout.tokens_per_step,
    } | ({"measured_speedup": trial.get_speedup(limits.max_tokens)} if trial else {})
    manifest = bench.make_manifest(
        best.left_out, name, max_tokens=limits.max_tokens, min_confidence=limits.min_confidence,
        acceptance=tuple(round(a, 4) for a in agreement.roll_out(settings.max_tokens, 0.0).acceptance), training=training,
    )  # fmt: skip
    save_draft(out, manifest, None)
    return Made(manifest=manifest, costs=costs, found=found, fixed=fixed, rollout=rollout, fixed_trial=fixed_trial, trial=trial)


def _count(judge: Callable[[LeftOut], Judged], bar: Any) -> Callable[[LeftOut], Judged]:
    def counted(left_out: LeftOut) -> Judged:
        """Judge a draft, and show it in the progress bar."""
        judged = judge(left_out)
        bar.update()
        bar.set_postfix_str(f"{left_out.num_parts} parts left out, {judged.longest.acceptance[0]:.0%} of first drafts accepted")
        return judged

    return counted
