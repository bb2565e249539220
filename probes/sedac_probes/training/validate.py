"""Validate: what thresholds and tiers save and cost on held-out text, with the per-token rule applied to every token.

Two measurements stand side by side. The engine that serves (its dtype and kernels, `phase: all`) gives perplexity ratio and agreement.
The same token ids go through `reduced` (transformers, fp32, the whole distribution) under the same rule: KL, entropies, and the exact
count of saved FLOPs, which the engine's top-k log-probabilities and its counters in large batches give only roughly; its own
perplexity ratio says how far the two are apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sedac.policy.model import EXACT, FULL, SKIP, Policy
from sedac.policy.request_keys import TIER_KEY
from sedac.probe import artifact
from sedac.probe.cascade import Knobs
from torch import Tensor

from sedac_probes.calibration.forms import Decided
from sedac_probes.calibration.reduced import Batch, Plain, ReducedModel
from sedac_probes.certification.family import Member, make_policy
from sedac_probes.collecting.recording import LLM, start_engine, tokenise
from sedac_probes.training.damage import make_batch, make_form

_GROUP = 8


@dataclass(frozen=True, kw_only=True)
class Exit:
    """What one checkpoint does under a policy."""

    layer: int
    threshold: float
    exit_rate: float
    """Share of all tokens that become confident here."""
    entropy_exited: float | None
    """Mean entropy of the full model's prediction for those, in nats. None where there are none."""
    entropy_rest: float | None
    """The same for all others."""
    saved: float
    """Share of all MLP FLOPs that these tokens would give up by hard exits here."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Quality and saving of one policy on one set of texts."""

    name: str
    exits: tuple[Exit, ...]
    saved: float
    """Share of all MLP FLOPs saved, counted per token by the reference."""
    perplexity_ratio: float
    """Ratio of the policy's perplexity to the full model's, by the engine."""
    agreement: float
    """Share of tokens whose most likely successor is the full model's, by the engine."""
    reference_ratio: float
    """Perplexity ratio by the reference in fp32."""
    kl: float
    """Mean KL divergence of the policy's next-token distribution from the full model's, in nats, by the reference."""
    speedup_bytes: float
    speedup_flops: float
    num_tokens: int
    """Number of scored tokens."""


class Traced(Decided):
    """A rule that remembers at which checkpoint each token became confident."""

    def begin(self, batch: Batch) -> None:
        """Forget the pass before."""
        super().begin(batch)
        self.exited_T = torch.full((batch.ids_BS.numel(),), -1)

    def watch(self, layer: int, stream_TD: Tensor) -> None:
        """Let the rule decide, and note who became confident."""
        before_T = self._sure_T.clone()
        super().watch(layer, stream_TD)
        self.exited_T[self._sure_T & ~before_T] = layer


def estimate_speedup(config: Mapping[str, Any], saved: float, context: int) -> tuple[float, float]:
    """Return the theoretical speed-up of a decode step at batch 1: by bytes read, and by FLOPs.

    D hidden size, F neurons, L layers, H heads and K key-value heads of size h, V vocabulary, n tokens of context. Weights read per
    token: MLPs M = 3 L D F, attention A = L D h (2 H + 2 K), lm_head D V. Bytes, in units of one weight: W = M + A + D V + 2 L K h n (the
    KV cache, of the weights' dtype). FLOPs: 2 (M + A + D V) + 4 L H h n. Speed-up: W / (W - saved M), the same for FLOPs with 2 M.
    """
    hidden, num_layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or hidden // heads
    mlps = 3 * num_layers * hidden * config["intermediate_size"]
    weights = mlps + num_layers * hidden * size * 2 * (heads + kv_heads) + hidden * config["vocab_size"]
    read = weights + 2 * num_layers * kv_heads * size * context
    flops = 2 * weights + 4 * num_layers * heads * size * context
    return read / (read - saved * mlps), flops / (flops - 2 * saved * mlps)


def make_policies(probe_set: artifact.ProbeSet, quantiles: Sequence[float]) -> dict[str, tuple[Member, Policy]]:
    """Return hard exits at each risk quantile of the manifest, then the set's tiers; all tokens subject."""
    manifest, found = probe_set.manifest, {}
    for quantile in quantiles:
        member = Member(floor=FULL, level=SKIP)
        policy = make_policy(manifest, member)
        at = {p.layer: p.metrics[f"risk_q{quantile}"] for p in manifest.probes}
        checkpoints = tuple(replace(c, threshold=at[c.layer]) for c in policy.checkpoints)
        found[f"hard exits, {quantile:.0%}"] = member, replace(policy, checkpoints=checkpoints, phase="all")
    for tier in manifest.tiers:
        member = Member(floor=tier.floor, level=tier.level, threshold_scale=tier.threshold_scale)
        found[f"tier {tier.name}"] = member, replace(make_policy(manifest, member), phase="all")
    return found


def score(llm: LLM, prompts: Sequence[list[int]], tier: str) -> tuple[list[float], list[int]]:
    """Return per scored token of requests of a tier, over all prompts: log-probability of the true token (nats), and the most likely token's id."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False, extra_args={TIER_KEY: tier})
    logprobs, best = [], []
    for output in llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False):
        for token, candidates in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            logprobs.append(candidates[token].logprob)
            best.append(min(candidates, key=lambda t: candidates[t].rank))
    return logprobs, best


def apply_policy(llm: LLM, policy: Policy, revision: int) -> None:
    """Put a policy into force in the engine's workers, with every token at its very level."""
    for answer in llm.collective_rpc("sedac_apply", args=(replace(policy, strict=True).to_dict(), revision)):
        assert not answer["violations"], answer


def validate(model: str, directory: Path, texts: Sequence[str], quantiles: Sequence[float], *, max_length: int = 512) -> list[Validation]:
    """Measure hard exits at each risk quantile, and the probe set's tiers, against the full model on `texts`."""
    probe_set = artifact.load(directory)
    llm = start_engine(model, probe_set=directory, max_length=max_length)
    prompts = tokenise(llm, list(texts), max_length)
    full_logprobs, full_best = score(llm, prompts, EXACT)
    reference = ReducedModel(model)
    batches = [make_batch(prompts[i : i + _GROUP]) for i in range(0, len(prompts), _GROUP)]
    results = []
    for revision, (name, (member, policy)) in enumerate(make_policies(probe_set, quantiles).items(), start=1):
        apply_policy(llm, policy, revision)
        logprobs, best = score(llm, prompts, policy.default_tier)
        knobs = {c.layer: Knobs(threshold=c.threshold * member.threshold_scale) for c in policy.checkpoints}
        floor, level = (make_form(reference, part, directory) for part in (member.floor, member.level))
        form = Traced(probe_set.probes, knobs, floor=floor, level=level)
        quality = reference.measure(batches, [form], None)[0]
        bytes_, flops = estimate_speedup(reference.model.config.to_dict(), quality.saved, max_length // 2)
        results.append(
            Validation(
                name=name,
                exits=trace_exits(reference, batches, form),
                saved=quality.saved,
                perplexity_ratio=math.exp((sum(full_logprobs) - sum(logprobs)) / len(logprobs)),
                agreement=sum(a == b for a, b in zip(best, full_best, strict=True)) / len(best),
                reference_ratio=quality.perplexity_ratio,
                kl=quality.kl,
                speedup_bytes=bytes_,
                speedup_flops=flops,
                num_tokens=len(logprobs),
            )
        )
    return results


@torch.inference_mode()
def trace_exits(model: ReducedModel, batches: Sequence[Batch], form: Traced) -> tuple[Exit, ...]:
    """Return what each checkpoint does under a rule."""
    exited, entropies = [], []
    for batch in batches:
        real_T = batch.real_BS.flatten()
        logprob_TV = model.run(batch, Plain())[0].flatten(0, 1)[real_T].log_softmax(-1)
        entropies.append(-(logprob_TV.exp() * logprob_TV).sum(-1))
        model.run(batch, form)
        exited.append(form.exited_T[real_T])
    exited_N, entropy_N = torch.cat(exited), torch.cat(entropies)
    rows = []
    for layer, knobs in form.knobs.items():
        here_N = exited_N == layer
        rate = here_N.float().mean().item()
        means = [entropy_N[side_N].mean().item() if side_N.any() else None for side_N in (here_N, ~here_N)]
        left = (model.num_layers - 1 - layer) / model.num_layers
        rows.append(
            Exit(
                layer=layer,
                threshold=knobs.threshold,
                exit_rate=rate,
                entropy_exited=means[0],
                entropy_rest=means[1],
                saved=rate * left,
            )
        )
    return tuple(rows)
