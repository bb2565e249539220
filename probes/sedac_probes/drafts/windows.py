"""Acceptance of a draft made of the model's own parts, from every position of some answers at once. Called by the search.

The texts are the full model's own greedy answers, so what a draft is held against is what verification would say, and a draft token that
agrees is the very token that follows in the text. Drafting begins after any answer token s: draft j reads the tokens s .. s+j, its own
reduced keys and values of those, and the full model's of all before s, exactly as the engine's draft does after a step whose last token
is s. A pass in full keeps each layer's keys and values; then one pass of the draft has a row for each j and each position p = s + j, which
attends to the full keys before s and to the rows of its own start: (0, s), (1, s+1) .. (j, p). Nothing is approximated as long as the drafts
before agreed, and what comes after a disagreement is never accepted. transformers on the CPU in fp32, as everything in `calibration.reduced`.

A answer tokens, B answers in a pass, I starts of an answer, K drafts of a start, S tokens of prompt and answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sedac.errors import ConfigError
from torch import Tensor
from tqdm import tqdm

from sedac_probes.calibration.reduced import Batch, Form, Plain, ReducedModel
from sedac_probes.drafts.acceptance import Rollout

_MAX_LOGITS = 48 * 2**20
"""Limit of logits of one pass, so that it takes at most 200 MB."""


@torch.inference_mode()
def answer(model: ReducedModel, prompts: Sequence[Sequence[int]], num_tokens: int, batch_size: int = 16) -> Tensor:
    """Return prompts of one length with the full model's greedy answers of `num_tokens` behind them: (N, S) int64; no text ends early."""
    from transformers.cache_utils import DynamicCache

    done = []
    groups = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    with tqdm(total=len(groups) * num_tokens, desc="answers of the full model", unit="step") as bar:
        for group in groups:
            ids_BS, cache = torch.tensor(group), DynamicCache()
            new_BS = ids_BS
            for _ in range(num_tokens):
                batch = Batch(ids_BS=new_BS, real_BS=torch.ones_like(new_BS, dtype=torch.bool))
                logits_BSV = model.run(batch, Plain(), attention={"use_cache": True, "past_key_values": cache})[0]
                new_BS = logits_BSV[:, -1:].argmax(-1)
                ids_BS = torch.cat([ids_BS, new_BS], dim=1)
                bar.update()
            done.append(ids_BS)
    return torch.cat(done)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Which drafts the full model would accept, from every start."""

    agrees_NIK: Tensor
    """Whether draft k of start i is the answer's token, bool. Start i is after answer token i."""
    confidence_NIK: Tensor
    """The draft's probability of its own choice, fp32. It is meaningless after the first that disagrees."""

    def count(self, max_tokens: int, min_confidence: float) -> tuple[Tensor, Tensor]:
        """Return the drafts made and accepted from each start (N, I) under these limits.

        A sequence stops after the draft with which the product of confidences falls below `min_confidence`, and drafts no answer's last
        token. After a disagreement the confidences are of rows that read the answer's tokens, not the draft's, so how many drafts follow it
        in vain is an estimate.
        """
        num_starts = self.agrees_NIK.shape[1]
        sure_NIK = self.confidence_NIK.cumprod(dim=-1)[..., : max_tokens - 1] >= min_confidence
        room_I = torch.arange(num_starts - 1, -1, -1)
        drafted_NI = torch.minimum(1 + sure_NIK.cumprod(dim=-1).sum(dim=-1), room_I)
        return drafted_NI, torch.minimum(self.agrees_NIK.cumprod(dim=-1).sum(dim=-1), drafted_NI)

    def roll_out(self, max_tokens: int, min_confidence: float) -> Rollout:
        """Return what generating these answers takes, step for step as the engine does it."""
        drafted_NI, accepted_NI = self.count(max_tokens, min_confidence)
        num_starts = drafted_NI.shape[1]
        rows_N, at_N = torch.arange(len(drafted_NI)), torch.zeros(len(drafted_NI), dtype=torch.long)
        drafted, accepted = [], []
        while len(rows_N):
            drafted.append(drafted_NI[rows_N, at_N])
            accepted.append(accepted_NI[rows_N, at_N])
            at_N = at_N + accepted[-1] + 1
            rows_N, at_N = rows_N[at_N < num_starts], at_N[at_N < num_starts]
        return _sum_up(torch.cat(drafted), torch.cat(accepted), max_tokens)

    def sum_up(self, max_tokens: int, min_confidence: float) -> Rollout:
        """Return the steps from all starts with room for K drafts: more of them than a rollout makes, so better for comparing drafts."""
        whole = self.agrees_NIK.shape[1] - self.agrees_NIK.shape[2]
        drafted_NI, accepted_NI = self.count(max_tokens, min_confidence)
        return _sum_up(drafted_NI[:, :whole].flatten(), accepted_NI[:, :whole].flatten(), max_tokens)


def _sum_up(drafted_N: Tensor, accepted_N: Tensor, max_tokens: int) -> Rollout:
    positions = range(max_tokens)
    return Rollout(
        num_tokens=int(accepted_N.sum()) + len(accepted_N),
        lengths=tuple(torch.bincount(drafted_N, minlength=max_tokens + 1).tolist()),
        accepted_at=tuple(int((accepted_N > i).sum()) for i in positions),
        reached_at=tuple(int(((drafted_N > i) & (accepted_N >= i)).sum()) for i in positions),
    )


class Windows:
    """Answers with the full model's keys and values, ready to be drafted in any form.

    Raises:
        ConfigError: an answer is not longer than the drafts, or the texts are longer than the model's sliding window.
    """

    @torch.inference_mode()
    def __init__(self, model: ReducedModel, ids_NS: Tensor, num_prompt: int, max_tokens: int) -> None:
        """`ids_NS` are prompts of `num_prompt` tokens with the full model's greedy answers; up to `max_tokens` drafts per start."""
        from transformers.cache_utils import DynamicCache

        length = ids_NS.shape[1]
        num_rows = length - num_prompt - 1
        if num_rows <= max_tokens:
            raise ConfigError(f"answers of {length - num_prompt} tokens are too short for {max_tokens} draft tokens; give {max_tokens + 2} at least")
        config = model.model.config
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()) and length > config.sliding_window:
            raise ConfigError(f"texts of {length} tokens exceed the model's sliding window of {config.sliding_window}; lower --tokens")
        self._model, self._max_tokens, self._num_rows = model, max_tokens, num_rows
        self._next_NA = ids_NS[:, num_prompt + 1 :]
        batch_size = max(1, _MAX_LOGITS // (num_rows * max_tokens * config.vocab_size))
        self._batches: list[tuple[Batch, list[tuple[Tensor, Tensor]]]] = []
        for ids_BS in ids_NS.split(batch_size):
            cache = DynamicCache()
            whole = Batch(ids_BS=ids_BS, real_BS=torch.ones_like(ids_BS, dtype=torch.bool))
            model.run(whole, Plain(), attention={"use_cache": True, "past_key_values": cache})
            rows_BR = ids_BS[:, num_prompt:-1].repeat(1, max_tokens)
            batch = Batch(ids_BS=rows_BR, real_BS=torch.ones_like(rows_BR, dtype=torch.bool))
            self._batches.append((batch, [(layer.keys, layer.values) for layer in cache.layers]))
        draft_R = torch.arange(max_tokens).repeat_interleave(num_rows)
        place_R = torch.arange(num_prompt, length - 1).repeat(max_tokens)
        start_R = place_R - draft_R
        full_RS = torch.arange(length) < start_R[:, None]
        own_RR = (start_R[:, None] == start_R) & (draft_R <= draft_R[:, None])
        self._mask_RS, self._place_R = torch.cat([full_RS, own_RR], dim=1), place_R

    @torch.inference_mode()
    def measure(self, form: Form) -> Agreement:
        """Draft in a form from every start of every answer."""
        tokens, confidences = [], []
        for batch, kept in self._batches:
            logits_BRV = self._model.run(batch, form, attention=self._attend(len(batch.ids_BS), kept))[0]
            best_BR, token_BR = logits_BRV.max(dim=-1)
            confidences.append((best_BR - logits_BRV.logsumexp(dim=-1)).exp())
            tokens.append(token_BR)
        shape = (-1, self._max_tokens, self._num_rows)
        agrees_NKA = torch.cat(tokens).view(shape) == self._next_NA[:, None]
        confidence_NKA = torch.cat(confidences).view(shape)
        agrees_NIK = torch.zeros(agrees_NKA.shape[0], self._num_rows, self._max_tokens, dtype=torch.bool)
        confidence_NIK = torch.zeros(agrees_NIK.shape)
        for draft in range(self._max_tokens):  # the row of draft k and start i is at place i + k
            agrees_NIK[:, : self._num_rows - draft, draft] = agrees_NKA[:, draft, draft:]
            confidence_NIK[:, : self._num_rows - draft, draft] = confidence_NKA[:, draft, draft:]
        return Agreement(agrees_NIK=agrees_NIK, confidence_NIK=confidence_NIK)

    def _attend(self, num_answers: int, kept: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        from transformers.cache_utils import DynamicCache

        return {
            "use_cache": True,
            "position_ids": self._place_R[None],
            "attention_mask": self._mask_RS.expand(num_answers, 1, -1, -1),
            "past_key_values": DynamicCache(kept),
        }
