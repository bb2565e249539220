"""Drafts with a trained head, adapters and exit heads: collect states, train, judge on held-out texts and in the engine.

Called by `distill`. `streams` and `heldout` under the work directory are collections; what an earlier run judged is not judged again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from sedac.errors import ConfigError
from sedac.probe.draft import DraftHead, DraftManifest, load_head, read_draft_manifest, save_draft

from sedac_probes.collecting.collection import read_description
from sedac_probes.collecting.recording import read_config
from sedac_probes.drafts.acceptance import Guesses, StepCosts, guess, propose, roll_out
from sedac_probes.drafts.candidates import POSITIONS, Candidate, Job, read_candidate, write_candidate
from sedac_probes.drafts.fit import fit
from sedac_probes.drafts.states import Source, StateCollection, collect_states, cut, read_states
from sedac_probes.drafts.target import Target, count_parameters, make_head, make_manifest, read_target
from sedac_probes.drafts.trial import Job as TrialJob
from sedac_probes.drafts.trial import run_trial

_HELDOUT_LENGTH = 256
_PROMPT_LENGTH = 64
_TRIAL_PROMPTS, _TRIAL_TOKENS = 24, 128
_ROW_SHARE = 0.05  # of a plain step, that a verified row costs; only until the engine is measured


def make_heads(job: Job, kind: str, depths: Sequence[int]) -> list[Candidate]:
    """Collect, then train and judge a head after each of the depths; adapters and exit heads."""
    if job.samples < 1 or job.heldout_samples < 1:
        raise ConfigError(f"--samples is {job.samples}, --heldout-samples {job.heldout_samples}; give at least 1")
    target = read_target(job.model)
    manifests = [make_manifest(target, kind, depth, job.neurons) for depth in depths]  # refuses before anything runs
    recorded = sorted({*depths, *job.record})
    source = Source(job.model, max_length=job.max_length, dtype=job.dtype)
    collect_states(
        job.work / "streams", source, job.documents, depths=recorded, num_pieces=job.samples, own_share=job.own_share, max_length=job.max_length,
        prompt_length=min(_PROMPT_LENGTH, job.max_length // 4),
    )  # fmt: skip
    length = min(_HELDOUT_LENGTH, job.max_length)
    collect_states(
        job.work / "heldout", source, job.heldout, depths=recorded, num_pieces=job.heldout_samples, own_share=1.0, max_length=length,
        prompt_length=min(_PROMPT_LENGTH, length // 4), greedy=True,
    )  # fmt: skip
    return [_make_head(job, target, manifest) for manifest in manifests]


def read_prompts(job: Job) -> list[list[int]]:
    """Return the prompts of the held-out texts."""
    from transformers import AutoTokenizer

    return cut(AutoTokenizer.from_pretrained(job.model), job.heldout, StateCollection(**read_description(job.work / "heldout")))


def _make_head(job: Job, target: Target, manifest: DraftManifest) -> Candidate:
    directory = job.work / "drafts" / manifest.name
    states, heldout = read_states(job.work / "streams", manifest.depth), read_states(job.work / "heldout", manifest.depth)
    head = make_head(target, manifest, job.settings.seed)
    losses = fit(head, states, heldout, target.lm_head_VD, job.settings, job.work / "fits" / f"{manifest.name}.pt")
    described = read_description(job.work / "streams")
    training = {k: described[k] for k in ("data_digest", "weights_sha256", "num_documents", "max_length", "own_share")} | asdict(job.settings)
    training |= {"num_tokens": states.starts[-1], "heldout_loss": min(loss for _, loss in losses)}
    manifest = replace(manifest, training=training)
    if known := _find_judged(job, directory, manifest, head):
        return known
    manifest = save_draft(directory, manifest, head)
    saved = load_saved(directory)
    texts = guess(saved, heldout, target.lm_head_VD)
    return judge(job, directory, manifest, saved, texts, tuple(losses))


def _find_judged(job: Job, directory: Path, manifest: DraftManifest, head: DraftHead) -> Candidate | None:
    """Return what an earlier run found of the very same head; None: nothing, or not enough."""
    path = directory / "result.json"
    if not path.exists():
        return None
    known, kept = read_candidate(path), read_draft_manifest(directory)
    if kept.training != manifest.training or known.is_measured < job.is_measured:
        return None
    weights = load_head(directory, kept)
    is_same = all(torch.equal(weights[name], p.to(torch.bfloat16).float()) for name, p in head.named_parameters())
    return known if is_same else None


def load_saved(directory: Path) -> DraftHead:
    """Return a draft's head as it will serve, its weights rounded to bf16; fp32."""
    manifest = read_draft_manifest(directory)
    head = DraftHead(manifest)
    head.load_state_dict(load_head(directory, manifest))
    return head.eval().requires_grad_(False)


def judge(
    job: Job, directory: Path, manifest: DraftManifest, head: DraftHead | None, texts: Sequence[Guesses], losses: tuple[tuple[int, float], ...] = ()
) -> Candidate:
    """Measure a draft's costs, propose its limits, and write both beside it; `texts` are its guesses on the held-out texts."""
    trial = None
    if job.is_measured:
        prompts = read_prompts(job)
        few = prompts[:: max(1, len(prompts) // _TRIAL_PROMPTS)][:_TRIAL_PROMPTS]
        trial = run_trial(
            TrialJob(
                model=job.model, draft=str(directory.resolve()), prompts=few, num_tokens=_TRIAL_TOKENS, lengths=(1, POSITIONS), num_rounds=1,
                dtype=job.dtype, is_eager=job.is_eager,
            )
        )  # fmt: skip
    costs = StepCosts.from_trial(trial) if trial else estimate_costs(job.model, manifest, head)
    fixed = roll_out(texts, POSITIONS)
    proposal = propose(texts, costs)
    candidate = Candidate(
        name=manifest.name, kind=manifest.kind, depth=manifest.depth, num_parameters=count_parameters(head), acceptance=fixed.acceptance,
        tokens_per_step=fixed.tokens_per_step, costs=costs, is_measured=trial is not None, predicted=costs.predict(fixed), proposal=proposal,
        heldout_loss=min((loss for _, loss in losses), default=None), losses=losses,
        measured=trial.get_speedup(POSITIONS) if trial else None, measured_acceptance=trial.get_acceptance(POSITIONS) if trial else (),
    )  # fmt: skip
    whole = roll_out(texts, max(POSITIONS, proposal.max_tokens))
    limits: dict[str, Any] = {"max_tokens": proposal.max_tokens, "min_confidence": proposal.min_confidence}
    save_draft(directory, replace(manifest, acceptance=tuple(round(a, 4) for a in whole.acceptance), **limits), head)
    write_candidate(directory, candidate)
    return candidate


def estimate_costs(model: str, manifest: DraftManifest, head: DraftHead | None) -> StepCosts:
    """Return costs in plain steps by the parameters that a pass reads; stands in until the engine is measured."""
    config = read_config(model)
    size, width = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or size // heads
    attention = size * head_size * (2 * heads + 2 * (config.get("num_key_value_heads") or heads))
    mlp, lm_head = 3 * size * width, size * config["vocab_size"]
    drafted = (manifest.depth - len(manifest.skip_attention)) * attention + (manifest.depth - len(manifest.skip_mlp)) * mlp
    whole = manifest.num_layers * (attention + mlp) + lm_head
    return StepCosts(plain=1.0, verify=1.0, row=_ROW_SHARE, draft_pass=(drafted + count_parameters(head) + lm_head) / whole)
