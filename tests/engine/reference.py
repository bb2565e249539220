"""An independent forward pass in transformers with SEDAC's rule of hard exits, for comparison in fp32.

Shares no code with the product: probes are read straight from safetensors, the rule is written out again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache


class Reference:
    """A transformers model whose MLPs are switched off per token after a checkpoint said so."""

    def __init__(self, model: Path, probe_set: Path, thresholds: dict[int, float]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
        self.weights = load_file(probe_set / "probes.safetensors")
        self.exited = torch.zeros(0, dtype=torch.bool)
        self.exit_layers: dict[int, int] = dict.fromkeys(thresholds, 0)
        for index, layer in enumerate(self.model.model.layers):
            layer.mlp.register_forward_hook(self._zero_exited)
            if index in thresholds:
                layer.register_forward_hook(self._make_checkpoint(index, thresholds[index]))

    def get_risk(self, layer: int, stream: torch.Tensor) -> torch.Tensor:
        z = stream.float() @ self.weights[f"{layer}.down.weight"].T
        mean, variance = z.mean(-1, keepdim=True), z.var(-1, unbiased=False, keepdim=True)
        z = (z - mean) / torch.sqrt(variance + 1e-5) * self.weights[f"{layer}.norm.weight"] + self.weights[f"{layer}.norm.bias"]
        return functional.softplus(z @ self.weights[f"{layer}.out.weight"].T + self.weights[f"{layer}.out.bias"])[:, 0]

    def _zero_exited(self, module, inputs, output):
        return torch.where(self.exited[None, :, None], 0.0, output)

    def _make_checkpoint(self, index: int, threshold: float):
        def hook(module, inputs, output):
            stream = (output[0] if isinstance(output, tuple) else output)[0]
            exiting = (self.get_risk(index, stream) < threshold) & ~self.exited
            self.exit_layers[index] += int(exiting.sum())
            self.exited = self.exited | exiting

        return hook

    @torch.no_grad()
    def score(self, prompt: list[int]) -> tuple[list[float], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Return log-probabilities of every prompt token but the first, and per layer (key, value) of shape (T, heads, size)."""
        self.exited = torch.zeros(len(prompt), dtype=torch.bool)
        cache = DynamicCache()
        ids = torch.tensor([prompt])
        logprobs = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0].log_softmax(-1)
        kv = [(layer.keys[0].permute(1, 0, 2), layer.values[0].permute(1, 0, 2)) for layer in cache.layers]
        return logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist(), kv
