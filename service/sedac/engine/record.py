"""Recording for the workshop: streams at checkpoints and the final entropy, on the numerics that serve.

Only active when the engine was started with `record` in its layout; read through the worker's `sedac_take_records`.
T tokens of the step, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_LOGIT_ROWS = 256  # bounds the fp32 logits held at once


@dataclass
class Recorder:
    """Collects one entry per forward pass until taken."""

    _entries: list[dict[str, Any]] = field(default_factory=list)
    _streams: dict[int, Tensor] = field(default_factory=dict)

    def add_stream(self, layer: int, stream_TD: Tensor) -> None:
        """Keep the residual stream after `layer` (T, D), fp32, of the running pass."""
        self._streams[layer] = stream_TD.detach().clone()

    def finish_step(self, requests: list[tuple[str, int, int]], final_TD: Tensor, compute_logits: Callable[[Tensor], Tensor | None]) -> None:
        """Close the pass: `requests` are (id, first position, number of tokens) in row order, `final_TD` the normed state."""
        num_tokens = sum(n for _, _, n in requests)
        entropy, logprob = [], []
        for rows_ND in torch.split(final_TD[:num_tokens], _LOGIT_ROWS):
            logits = compute_logits(rows_ND)
            assert logits is not None
            logprobs_NV = logits.float().log_softmax(-1)
            entropy.append(-(logprobs_NV.exp() * logprobs_NV).sum(-1))
            logprob.append(logprobs_NV.max(-1).values)
        entry = {"requests": requests, "streams": self._streams, "entropy": torch.cat(entropy), "top_logprob": torch.cat(logprob)}
        self._entries.append(entry)
        self._streams = {}

    def take(self) -> list[dict[str, Any]]:
        """Return the entries since the last call, oldest first, and forget them."""
        entries, self._entries = self._entries, []
        return entries
