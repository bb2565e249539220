"""Recording for the workshop: streams at checkpoints, what the model then said, and how much each neuron did, on the numerics that serve.
For the distillation of drafts it keeps the final states instead: all that the model can say, and smaller than its distribution.

Only active when the engine was started with `record` in its layout; read through the worker's `sedac_take_records` and
`sedac_take_statistics`. It watches and changes nothing: every token is computed in full by the layers that serve.
T tokens of the step, N rows of a piece of it, D hidden size, V vocabulary, K most likely tokens, F neurons (of this rank's share).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_LOGIT_ROWS = 256  # bounds the fp32 logits held at once
NO_TOKEN = -1
"""Stands in place of the next token where the request has none yet."""


class Recorder:
    """Collects one entry per forward pass, and sums per neuron, until taken."""

    def __init__(self, top_k: int, *, keeps_final: bool = False) -> None:
        """`keeps_final`: entries hold streams and final states in bf16, and nothing of logits or neurons."""
        self.top_k, self.keeps_final = top_k, keeps_final
        self.layers: frozenset[int] | None = None
        """Layers whose streams are kept. None means those of all checkpoints."""
        self.left_out: dict[int, str] = {}
        """Layers without neuron statistics, and why."""
        self._entries: list[dict[str, Any]] = []
        self._streams: dict[int, Tensor] = {}
        self._up_F: dict[int, Tensor] = {}
        self._hidden_F: dict[int, Tensor] = {}

    def add_stream(self, layer: int, stream_TD: Tensor) -> None:
        """Keep the residual stream after `layer` (T, D), fp32, of the running pass."""
        if self.layers is None or layer in self.layers:
            self._streams[layer] = stream_TD.detach().to(torch.bfloat16 if self.keeps_final else torch.float32, copy=True)

    def attach(self, layer: int, mlp: Any, count_rows: Callable[[], int], *, is_eager: bool) -> None:
        """Watch the MLP of decoder layer `layer` from now on; `count_rows` gives the running step's real rows, 0 outside of a step."""
        if self.keeps_final:
            return
        gate_up, down = getattr(mlp, "gate_up_proj", None), getattr(mlp, "down_proj", None)
        if not isinstance(gate_up, nn.Module) or not isinstance(down, nn.Module) or getattr(mlp, "act_fn", None) is None:
            self.left_out[layer] = f"{type(mlp).__name__} is no MLP of gate, up and down projection"
            return
        if not is_eager:
            self.left_out[layer] = "compiled layers can't be watched; start the engine with enforce_eager"
            return

        def see_up(module: Any, inputs: Any, output: Any) -> None:
            """Add what the up projection gives to the sums."""
            if num_rows := count_rows():
                up_TF = (output[0] if isinstance(output, tuple) else output)[:num_rows].chunk(2, dim=-1)[1]
                _add(self._up_F, layer, up_TF)

        def see_hidden(module: Any, inputs: Any) -> None:
            """Add what the down projection takes to the sums."""
            if num_rows := count_rows():
                _add(self._hidden_F, layer, inputs[0][:num_rows])

        gate_up.register_forward_hook(see_up)
        down.register_forward_pre_hook(see_hidden)

    def finish_step(
        self, requests: list[tuple[str, int, int]], next_T: Tensor, final_TD: Tensor, compute_logits: Callable[[Tensor], Tensor | None]
    ) -> None:
        """Close the pass: `requests` are (id, first position, number of tokens) in row order, `final_TD` the normed state.

        `next_T` (int64) are the tokens that follow in the requests, or NO_TOKEN.
        """
        if self.keeps_final:
            final = final_TD[: len(next_T)].detach().to(torch.bfloat16, copy=True)
            self._entries.append({"requests": requests, "streams": self._streams, "final": final})
            self._streams = {}
            return
        pieces: dict[str, list[Tensor]] = {name: [] for name in ("entropy", "top_logprob", "top_token", "next_logprob")}
        for rows_ND, next_N in zip(final_TD[: len(next_T)].split(_LOGIT_ROWS), next_T.to(final_TD.device).split(_LOGIT_ROWS), strict=True):
            logits_NV = compute_logits(rows_ND)
            if logits_NV is None:
                continue  # under tensor parallelism only the first rank gets them, after all have computed; it alone keeps entries
            logprobs_NV = logits_NV.float().log_softmax(-1)
            pieces["entropy"].append(-(logprobs_NV.exp() * logprobs_NV).sum(-1))
            top = logprobs_NV.topk(min(self.top_k, logprobs_NV.shape[1]), dim=-1)
            pieces["top_logprob"].append(top.values)
            pieces["top_token"].append(top.indices.int())
            true_N = logprobs_NV.gather(1, next_N.clamp(min=0)[:, None])[:, 0]
            pieces["next_logprob"].append(torch.where(next_N == NO_TOKEN, torch.nan, true_N))
        if pieces["entropy"]:
            said = {name: torch.cat(parts) for name, parts in pieces.items()}
            self._entries.append({"requests": requests, "streams": self._streams} | said)
        self._streams = {}

    def take(self) -> list[dict[str, Any]]:
        """Return the entries since the last call, oldest first, and forget them."""
        entries, self._entries = self._entries, []
        return entries

    def take_statistics(self) -> dict[str, Any]:
        """Return {"up": ..., "hidden": ..., "left_out": ...} since the last call and forget the sums.

        `up` and `hidden` hold by layer the sums over tokens of abs(up) and abs(act(gate) * up), float64 (F,).
        """
        taken = {"up": self._up_F, "hidden": self._hidden_F, "left_out": self.left_out}
        self._up_F, self._hidden_F = {}, {}
        return taken


def _add(sums: dict[int, Tensor], layer: int, values_TF: Tensor) -> None:
    total_F = values_TF.abs().sum(0, dtype=torch.float64)
    sums[layer] = sums[layer] + total_F if layer in sums else total_F
