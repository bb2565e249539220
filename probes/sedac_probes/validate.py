"""Validate: what a policy really costs, measured through the engine on held-out text with the per-token rule applied.

Teacher-forced with `phase: all`, so every token of the text is subject to the rule, as generated tokens are when serving.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sedac.policy import Checkpoint, Policy

from sedac_probes.recording import LLM, start_engine, tokenise


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Quality and saving of one policy on one set of texts."""

    exit_rates: dict[int, float]
    """share of all tokens that exit at each checkpoint"""
    skipped: float
    """share of MLP blocks, and so of MLP FLOPs, not computed"""
    perplexity_ratio: float
    """policy over full model"""
    agreement: float
    """share of tokens whose most likely successor is the full model's"""
    num_tokens: int
    """scored tokens"""


def score(llm: LLM, prompts: Sequence[list[int]]) -> tuple[list[float], list[int]]:
    """Return per scored token, over all prompts: log-probability of the true token (nats), and the most likely token's id."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    logprobs, best = [], []
    for output in llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False):
        for token, candidates in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            logprobs.append(candidates[token].logprob)
            best.append(min(candidates, key=lambda t: candidates[t].rank))
    return logprobs, best


def apply_policy(llm: LLM, policy: Policy, revision: int) -> None:
    """Put a policy into force in the engine's workers."""
    for answer in llm.collective_rpc("sedac_apply", args=(policy.to_dict(), revision)):
        assert not answer["violations"], answer


def validate(model: str, probe_set: Path, texts: Sequence[str], policies: Sequence[dict[int, float]], *, max_length: int = 512) -> list[Validation]:
    """Measure each policy, given as thresholds by layer, against the full model on `texts`."""
    llm = start_engine(model, probe_set=probe_set, max_length=max_length)
    prompts = tokenise(llm, list(texts), max_length)
    full_logprobs, full_best = score(llm, prompts)
    results = []
    for revision, thresholds in enumerate(policies, start=1):
        checkpoints = tuple(Checkpoint(layer=layer, threshold=t) for layer, t in sorted(thresholds.items()))
        before = llm.collective_rpc("sedac_get_stats")[0]
        apply_policy(llm, Policy(enabled=True, phase="all", checkpoints=checkpoints), revision)
        logprobs, best = score(llm, prompts)
        after = llm.collective_rpc("sedac_get_stats")[0]
        tokens = after["num_tokens"] - before["num_tokens"]
        skipped = after["num_mlp_blocks_skipped"] - before["num_mlp_blocks_skipped"]
        computed = after["num_mlp_blocks_computed"] - before["num_mlp_blocks_computed"]
        exits = {a["layer"]: a["num_exited"] - b["num_exited"] for a, b in zip(after["checkpoints"], before["checkpoints"], strict=True)}
        results.append(
            Validation(
                exit_rates={layer: n / tokens for layer, n in exits.items()},
                skipped=skipped / (skipped + computed),
                perplexity_ratio=math.exp((sum(full_logprobs) - sum(logprobs)) / len(logprobs)),
                agreement=sum(a == b for a, b in zip(best, full_best, strict=True)) / len(best),
                num_tokens=len(logprobs),
            )
        )
    return results
