"""A Llama-like causal model whose MLPs can be given another form or lose their attention, and what that costs and saves.

Used by `calibrate`, `compare` and `distill`: transformers on the CPU in fp32, teacher-forced, every token subject to the form. It shows what a
level means for quality, with the naive reductions of sedac.probe.levels; it says nothing about time, and it never serves.

T tokens (B sequences of S, padded at the right), D hidden size, F neurons, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from sedac.errors import ConfigError
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "act_fn")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences padded at the right; with causal attention the padding touches nothing before it."""

    ids_BS: Tensor
    real_BS: Tensor
    """Whether a place holds a token and no padding, bool."""


class Form(Protocol):
    """How the layers of one forward pass are computed."""

    def begin(self, batch: Batch) -> None:
        """Forget the pass before."""

    def watch(self, layer: int, stream_TD: Tensor) -> None:
        """See the residual stream after a layer."""

    def attends(self, layer: int) -> bool:
        """Tell whether a layer's attention runs; one that does not adds nothing to the stream and nothing to the cache."""

    def compute(self, layer: int, x_TD: Tensor, mlp: Any) -> tuple[Tensor, Tensor]:
        """Return the MLP's output (T, D) and the share of its FLOPs that each token takes (T,); called once per layer, in order."""


class Plain:
    """The model's own layers; other forms start from it."""

    def begin(self, batch: Batch) -> None:
        """Remember nothing."""

    def watch(self, layer: int, stream_TD: Tensor) -> None:
        """Watch nothing."""

    def attends(self, layer: int) -> bool:
        """Let attention run everywhere."""
        return True

    def compute(self, layer: int, x_TD: Tensor, mlp: Any) -> tuple[Tensor, Tensor]:
        """Compute all of it."""
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x_TD)) * mlp.up_proj(x_TD)), torch.ones(x_TD.shape[0])


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a form saves and costs on some text."""

    saved: float
    """Share of all MLP FLOPs not computed."""
    perplexity_ratio: float
    """Ratio of the form's perplexity to the full model's."""
    agreement: float
    """Share of tokens whose most likely successor is the full model's."""
    kl: float
    """Mean KL divergence of the form's next-token distribution from the full model's, in nats."""
    num_tokens: int
    """Number of scored tokens."""


class ReducedModel:
    """The model, its tokenizer and its MLPs' shapes.

    Raises:
        ConfigError: the model's MLPs are not of the gate, up and down kind, or its attention is not called `self_attn`.
    """

    def __init__(self, directory: str) -> None:
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        kind = type(self.model).__name__
        layers = getattr(getattr(self.model, "model", None), "layers", None)
        remedy = "calibration knows models whose every layer has an MLP of gate_proj, up_proj, down_proj and act_fn (Llama, Qwen2, Mistral)"
        if layers is None or not all(hasattr(getattr(layer, "mlp", None), name) for layer in layers for name in _PROJECTIONS):
            raise ConfigError(f"{directory} is a {kind}, whose MLPs are of another kind; {remedy}")
        if not all(hasattr(layer, "self_attn") for layer in layers):
            raise ConfigError(f"{directory} is a {kind} with layers without `self_attn`; {remedy}, and their attention under that name")
        if any(getattr(layer.mlp, name).bias is not None for layer in layers for name in _PROJECTIONS[:3]):
            raise ConfigError(f"{directory} is a {kind} whose MLPs have biases; {remedy}, all three without bias")
        named = getattr(self.model.config, "hidden_act", None) or getattr(self.model.config, "hidden_activation", None)
        if named not in _ACTIVATIONS:
            raise ConfigError(f"{directory} uses the activation {named!r}; reduced levels know {', '.join(sorted(_ACTIVATIONS))}")
        sizes = {tuple(layer.mlp.gate_proj.weight.shape) for layer in layers}
        if len(sizes) != 1:
            raise ConfigError(f"{directory} is a {kind} with MLPs of several sizes {sorted(sizes)}; a probe set has one intermediate size")
        self.mlps = [layer.mlp for layer in layers]
        self.num_layers = len(self.mlps)
        self.intermediate_size, self.hidden_size = sizes.pop()
        self.activation = _ACTIVATIONS[named]
        self._form: Form = Plain()
        self._computed_T: Tensor = torch.zeros(0)
        self._active = range(self.num_layers)
        self._resumed_BSD: Tensor | None = None
        for index, layer in enumerate(layers):
            layer.mlp.forward = self._make_mlp(index, layer.mlp)
            layer.self_attn.forward = self._make_attention(index, layer.self_attn.forward)
            layer.forward = self._make_layer(index, layer.forward)

    def _make_mlp(self, index: int, mlp: Any) -> Callable[[Tensor], Tensor]:
        def forward(x_BSD: Tensor) -> Tensor:
            """Compute the MLP as the form says."""
            y_TD, computed_T = self._form.compute(index, x_BSD.flatten(0, 1), mlp)
            self._computed_T = self._computed_T + computed_T
            return y_TD.view_as(x_BSD)

        return forward

    def _make_attention(self, index: int, plain: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
            """Compute the attention, or give zeros where the form leaves it out."""
            if self._form.attends(index):
                return plain(hidden_states, *args, **kwargs)
            return torch.zeros_like(hidden_states), None

        return forward

    def _make_layer(self, index: int, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(stream_BSD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Run the layer and show its stream to the form, or leave out a layer that is not active."""
            if index not in self._active:
                return stream_BSD if self._resumed_BSD is None or index > self._active.start else self._resumed_BSD
            if index == self._active.start and self._resumed_BSD is not None:
                stream_BSD = self._resumed_BSD
            stream_BSD = plain(stream_BSD, *args, **kwargs)
            self._form.watch(index, stream_BSD.flatten(0, 1))
            return stream_BSD

        return forward

    def make_batches(self, texts: Sequence[str], *, max_length: int = 512, batch_size: int = 8) -> list[Batch]:
        """Cut one window of at most `max_length` tokens out of each text, at a line start, at a place that its content decides."""
        rows = []
        for text in texts:
            span = max(1, len(text) - 4 * max_length)
            start = text.find("\n", int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % span) + 1
            ids = self.tokenizer(text[start : start + 16 * max_length])["input_ids"][:max_length]
            if len(ids) >= 2:
                rows.append(torch.tensor(ids))
        rows.sort(key=len)  # little padding
        batches = []
        for group in (rows[i : i + batch_size] for i in range(0, len(rows), batch_size)):
            ids_BS = torch.nn.utils.rnn.pad_sequence(group, batch_first=True)
            real_BS = torch.arange(ids_BS.shape[1]) < torch.tensor([len(row) for row in group])[:, None]
            batches.append(Batch(ids_BS=ids_BS, real_BS=real_BS))
        if not batches:
            raise ConfigError("no text to calibrate with; name texts of at least 200 characters")
        return batches

    def run(
        self, batch: Batch, form: Form, start: int = 0, stream_BSD: Tensor | None = None, attention: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, float]:
        """Return the logits (B, S, V) under a form, and the share of all MLP FLOPs that the real tokens took.

        With the stream before layer `start` given, the layers before it are not run again; they count as full. `attention`: what
        the model's forward is told of positions, mask and cache; else causal, without a cache.
        """
        self._form, self._computed_T = form, torch.full((batch.ids_BS.numel(),), float(start))
        self._active, self._resumed_BSD = range(start, self.num_layers), stream_BSD
        form.begin(batch)
        logits_BSV = self.model(input_ids=batch.ids_BS, **(attention or {"use_cache": False})).logits
        return logits_BSV, self._computed_T[batch.real_BS.flatten()].mean().item() / self.num_layers

    def advance(self, batch: Batch, form: Form, layer: int, stream_BSD: Tensor | None) -> Tensor:
        """Run one layer under a form: the stream after it, given the one before it (None: the embeddings, for layer 0)."""
        self._form, self._computed_T = form, torch.zeros(batch.ids_BS.numel())
        self._active, self._resumed_BSD = range(layer, layer + 1), stream_BSD
        after: list[Tensor] = []
        form.begin(batch)
        handle = self.model.model.norm.register_forward_pre_hook(lambda _module, inputs: after.append(inputs[0]))
        self.model.model(input_ids=batch.ids_BS, use_cache=False)
        handle.remove()
        return after[0]

    @torch.inference_mode()
    def measure(self, batches: Sequence[Batch], forms: Sequence[Form], description: str | None = "measure") -> list[Quality]:
        """Measure each form against the full model on the same text; no progress bar without a description."""
        sums = torch.zeros(len(forms), 4, dtype=torch.float64)  # saved, loss difference, agreement, KL
        num_tokens = num_scored = 0
        bar = tqdm(total=len(batches) * (len(forms) + 1), desc=description, unit="pass", disable=description is None)
        for batch in batches:
            scored_BS = batch.real_BS[:, 1:]
            next_N = batch.ids_BS[:, 1:][scored_BS]
            full_NV = self.run(batch, Plain())[0][:, :-1][scored_BS].log_softmax(-1)
            full_N, best_N = full_NV.gather(1, next_N[:, None]).squeeze(1), full_NV.argmax(-1)
            count = int(batch.real_BS.sum())
            num_tokens, num_scored = num_tokens + count, num_scored + len(next_N)
            bar.update()
            for i, form in enumerate(forms):
                logits_BSV, computed = self.run(batch, form)
                form_NV = logits_BSV[:, :-1][scored_BS].log_softmax(-1)
                sums[i, 0] += (1 - computed) * count
                sums[i, 1] += (full_N - form_NV.gather(1, next_N[:, None]).squeeze(1)).double().sum()
                sums[i, 2] += (form_NV.argmax(-1) == best_N).sum()
                sums[i, 3] += functional.kl_div(form_NV, full_NV, log_target=True, reduction="sum").double()
                bar.update()
        bar.close()
        sums[:, 0] /= num_tokens
        sums[:, 1:] /= num_scored
        return [Quality(saved=s, perplexity_ratio=math.exp(d), agreement=a, kl=k, num_tokens=num_scored) for s, d, a, k in sums.tolist()]

    @torch.inference_mode()
    def get_logprobs(self, batches: Sequence[Batch], form: Form) -> tuple[Tensor, float]:
        """Return the log-probability of every next token (N,), nats, under a form, and the share of all MLP FLOPs that it saves."""
        parts, saved = [], 0.0
        for batch in batches:
            scored_BS = batch.real_BS[:, 1:]
            logits_BSV, computed = self.run(batch, form)
            logprobs_NV = logits_BSV[:, :-1][scored_BS].log_softmax(-1)
            parts.append(logprobs_NV.gather(1, batch.ids_BS[:, 1:][scored_BS][:, None]).squeeze(1))
            saved += (1 - computed) * int(batch.real_BS.sum())
        return torch.cat(parts), saved / sum(int(batch.real_BS.sum()) for batch in batches)
