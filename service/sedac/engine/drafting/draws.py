"""Drawing draft tokens from the draft's logits, by each request's own sampling parameters.

The rejection sampler needs what a token was drawn from, q: it accepts with probability min(1, p / q) and else draws from the rest of p
(arXiv:2211.17192, section 2.3), so the answer's distribution is the model's whatever q is.
N drafting sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sedac.engine.backends.base import pick
from sedac.engine.drafting.parts import apply_top_k_top_p

_SEED_SALT = 0x5EDAC


@dataclass(kw_only=True)
class Draws:
    """Sampling parameters of the drafting sequences."""

    temperature_N: Tensor
    """Temperatures of the sequences. 0 means greedy."""
    top_k_N: Tensor | None
    top_p_N: Tensor | None
    generators: dict[int, torch.Generator]
    """Generators of the sequences with a seed, by number."""

    @classmethod
    def from_batch(cls, sampling: Any, rows: list[int], num_reqs: int, generators: dict[int, torch.Generator]) -> Draws | None:
        """Read the batch's sampling metadata at `rows`; None where all are greedy."""
        if sampling.all_greedy:
            return None
        index_N = None if len(rows) == num_reqs else torch.tensor(rows, device=sampling.temperature.device)

        def take(values: Tensor | None) -> Tensor | None:
            """Return the values at the drafting rows; None: there are none."""
            return values if values is None or index_N is None else values[index_N]

        temperature_N = take(sampling.temperature)
        assert temperature_N is not None
        if not bool((temperature_N > 0).any()):
            return None
        return cls(temperature_N=temperature_N, top_k_N=take(sampling.top_k), top_p_N=take(sampling.top_p), generators=generators)

    def keep(self, kept: list[int]) -> Draws:
        """Go on with these of the sequences, by number."""
        index_N = torch.tensor(kept, device=self.temperature_N.device)
        return Draws(
            temperature_N=self.temperature_N[index_N],
            top_k_N=None if self.top_k_N is None else self.top_k_N[index_N],
            top_p_N=None if self.top_p_N is None else self.top_p_N[index_N],
            generators={new: self.generators[old] for new, old in enumerate(kept) if old in self.generators},
        )


def draw(logits_NV: Tensor, draws: Draws | None, *, pick: Callable[[Tensor], tuple[Tensor, Tensor]] = pick) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return tokens (N,), confidences (N,) in 0..1 and, where any sequence samples, what they were drawn from (N, V), fp32.

    A token's confidence is its own probability in the draft's distribution at temperature 1. `pick` serves where all are greedy: it
    returns the most likely tokens and their probabilities, as a backend's does.
    """
    if draws is None:
        return *pick(logits_NV), None
    logits_NV = logits_NV.float()
    greedy_N = logits_NV.argmax(-1)
    samples_N = draws.temperature_N > 0
    scaled_NV = logits_NV / torch.where(samples_N, draws.temperature_N, 1.0)[:, None]
    probs_NV = apply_top_k_top_p(scaled_NV, draws.top_k_N, draws.top_p_N).softmax(-1)
    noise_NV = torch.empty_like(probs_NV).exponential_()
    for number, generator in draws.generators.items():
        noise_NV[number].exponential_(generator=generator)
    sampled_N = (probs_NV / noise_NV).argmax(-1)  # the Gumbel-max trick with exponentials
    tokens_N = torch.where(samples_N, sampled_N, greedy_N)
    chosen_N = logits_NV.gather(1, tokens_N[:, None])[:, 0]
    return tokens_N, (chosen_N - logits_NV.logsumexp(-1)).exp(), probs_NV


def make_generator(seed: int, device: torch.device) -> torch.Generator:
    """Return a request's own source of draft noise: reproducible, and independent of what verifies."""
    return torch.Generator(device=device).manual_seed((seed ^ _SEED_SALT) & (2**63 - 1))
