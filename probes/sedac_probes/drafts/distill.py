"""Distill: make drafts of one kind, judge each on held-out texts and in the engine, and put them into the table.

Called by the command `distill`. Everything lies under `work` and is made once, so a run that was stopped goes on, and runs of several
kinds share one table. `MAKERS` says how each kind is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sedac.errors import ConfigError
from sedac.probe.draft import ADAPTER, EXIT_HEAD, REDUCED

from sedac_probes.collecting.recording import read_config
from sedac_probes.drafts import reduced_report
from sedac_probes.drafts.bench import Settings
from sedac_probes.drafts.candidates import POSITIONS, Candidate, Job, read_candidates, write_candidate
from sedac_probes.drafts.heads import make_heads
from sedac_probes.drafts.reduced import make_reduced_draft


def make_reduced(job: Job, kind: str, depths: Sequence[int]) -> list[Candidate]:
    """Make the candidate `reduced` of a job; everything that the search saw goes to the terminal, and to reduced/ under the work directory.

    Raises:
        ConfigError: depths were asked for, or what `make_reduced_draft` raises.
    """
    if depths:
        raise ConfigError(f"--layers is {', '.join(map(str, depths))}; a reduced draft runs over all layers: leave --layers out")
    prompt_tokens = min(64, job.max_length // 4)
    settings = Settings(
        num_heldout=min(Settings.num_heldout, job.heldout_samples), prompt_tokens=prompt_tokens,
        check_tokens=min(128, job.max_length - prompt_tokens),
        answer_tokens=min(64, job.max_length - prompt_tokens), dtype=job.dtype, is_eager=job.is_eager, is_measured=job.is_measured,
    )  # fmt: skip
    work, out = job.work / kind, job.work / "drafts" / kind
    made = make_reduced_draft(job.model, job.documents, job.heldout, out, work=work, probe_set=job.probe_set, name=kind, settings=settings)
    reduced_report.print_report(made)
    reduced_report.write(work, made)
    best = made.found.best
    limits = replace(best.proposal, speedup=made.predicted, tokens_per_step=made.rollout.tokens_per_step)
    candidate = Candidate(
        name=kind, kind=kind, depth=made.manifest.depth, num_parameters=0, acceptance=made.fixed.acceptance,
        tokens_per_step=made.fixed.tokens_per_step, costs=best.costs, is_measured=made.trial is not None, predicted=best.costs.predict(made.fixed),
        proposal=limits, measured=made.fixed_trial.get_speedup(POSITIONS) if made.fixed_trial else None,
        measured_acceptance=made.fixed_trial.get_acceptance(POSITIONS) if made.fixed_trial else (),
    )  # fmt: skip
    write_candidate(out, candidate)
    return [candidate]


Maker = Callable[[Job, str, Sequence[int]], list[Candidate]]
MAKERS: dict[str, Maker] = {ADAPTER: make_heads, EXIT_HEAD: make_heads, REDUCED: make_reduced}
"""Makes candidates of each kind from a job, the kind and the depths asked for, each in `drafts/<name>` with `write_candidate`."""
DEPTHS = {ADAPTER: (0.17, 0.25, 0.33), EXIT_HEAD: (0.5, 0.67)}
"""Usual depths, in shares of the model's layers."""


def distill(job: Job, kind: str, depths: Sequence[int] = ()) -> list[Candidate]:
    """Make the drafts of one kind and return all candidates under the work directory, the best first.

    Raises:
        ConfigError: the kind is unknown, a value is out of range, or the model can't have such a draft.
    """
    if kind not in MAKERS:
        raise ConfigError(f"--kind is {kind!r}; give one of {', '.join(MAKERS)}")
    job.settings.check()
    num_layers = read_config(job.model)["num_hidden_layers"]
    usual = sorted({max(1, min(num_layers - 1, round(share * num_layers))) for share in DEPTHS.get(kind, ())})
    MAKERS[kind](job, kind, tuple(depths) or tuple(usual))
    return read_candidates(job.work)
