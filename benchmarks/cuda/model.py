"""A decoder of random weights with a real model's shapes and a static KV cache: one step of it, dense, reduced, or in float64.

Left out on all sides alike: embedding, rotary positions, logits, sampling. Attention is torch's, over the whole cache.
T tokens, one of each sequence; D hidden size, S tokens in the cache, H heads.
"""

from __future__ import annotations

import torch
from cases import CONTEXTUAL, EXITS, SKIP, Ceilings, Plan, Shape
from mlps import NEVER, Mlps, make_tokens, restart, run_dense
from sedac.engine.backends.cuda.backend import CudaBackend
from sedac.engine.backends.levels import LevelTable
from sedac.engine.step.state import State
from sedac.policy.layout import Layout
from sedac.policy.model import Checkpoint, Policy
from sedac.probe.probe import LREProbe
from torch import Tensor
from torch.nn import functional


class Decoder:
    """All layers of one shape; see the module's docstring."""

    def __init__(
        self, shape: Shape, num_tokens: int, cache_size: int, dtype: torch.dtype, device: torch.device, *, num_caches: int, rank: int
    ) -> None:
        def make(*size: int) -> Tensor:
            return (torch.randn(size, device=device) / size[-1] ** 0.5).to(dtype)

        self.shape, self.num_tokens, self.cache_size, self.dtype, self.device = shape, num_tokens, cache_size, dtype, device
        self.mlps = Mlps(shape, shape.num_layers, dtype, device, max_num_tokens=max(16, num_tokens))
        self.layers = [max(0, min(shape.num_layers - 2, round(at * shape.num_layers) - 1)) for at in EXITS]
        self.mlps.state = self._make_state(rank)
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_size
        self.qkv = [make(width, shape.hidden_size) for _ in range(shape.num_layers)]
        self.out = [make(shape.hidden_size, shape.num_heads * shape.head_size) for _ in range(shape.num_layers)]
        size = (num_caches, num_tokens, shape.num_kv_heads, cache_size, shape.head_size)
        self.keys, self.values = (torch.randn(size, device=device).to(dtype) for _ in range(2))
        self.hidden_TD = torch.randn(num_tokens, shape.hidden_size, device=device).to(dtype)

    def _make_state(self, rank: int) -> State:
        table: LevelTable = self.mlps.table
        layout = Layout(
            num_layers=self.shape.num_layers, hidden_size=self.shape.hidden_size, checkpoint_layers=tuple(sorted(set(self.layers))), probe_set="b",
            probe_set_sha256="0" * 64, levels=table.names, max_rank=rank,
        )  # fmt: skip
        probes = {layer: LREProbe(self.shape.hidden_size, rank).requires_grad_(False).to(self.device) for layer in layout.checkpoint_layers}
        return State(layout, probes, table, max_num_tokens=max(16, self.num_tokens), device=self.device, make_backend=CudaBackend)

    def attend(self, layer: int, hidden_TD: Tensor) -> Tensor:
        """Return attention's output (T, D) over the cache, whose last place the step's own token takes."""
        shape, cache = self.shape, layer % self.keys.shape[0]
        sizes = [shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size, shape.num_kv_heads * shape.head_size]
        parts = functional.linear(hidden_TD, self.qkv[layer].to(hidden_TD.dtype)).split(sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, shape.head_size)) for part in parts)
        keys, values = (held[cache].to(hidden_TD.dtype) for held in (self.keys, self.values))  # in float64 a copy, which the write below stays in
        keys[:, :, -1], values[:, :, -1] = k, v
        seen = functional.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)
        return functional.linear(seen.flatten(1), self.out[layer].to(hidden_TD.dtype))

    def prepare(self, plan: Plan) -> None:
        """Make the MLPs for a plan, with thresholds by the gates that these inputs really have, and put its policy into force; no step runs."""
        state, mlps = self.mlps.state, self.mlps
        mlps.end()
        exits = None if plan.exits_at is None else self.layers[EXITS.index(plan.exits_at)]
        checkpoints = tuple(Checkpoint(layer=layer, threshold=1e9 if layer == exits else NEVER) for layer in state.layout.checkpoint_layers)
        state.apply(Policy(enabled=True, checkpoints=checkpoints), 1)
        mlps.prepare(plan.case, [self.hidden_TD] * len(mlps.weights))
        self.levels = plan.case.get_levels(self.num_tokens)
        self.floor_T = torch.tensor(self.levels, dtype=torch.uint8, device=self.device)
        if plan.case.level == CONTEXTUAL:
            for layer, normed_TD in enumerate(self.run(reduced=False, keep=True)):
                mlps.mlps[layer].parameter_V[CONTEXTUAL] = mlps.find_threshold(layer, normed_TD, plan.case.active)

    def begin(self) -> None:
        """Start the plan's step; the one that runs ends."""
        self.mlps.end()
        self.mlps.state.begin_step(self.num_tokens, make_tokens(self.levels))

    def warm_up(self) -> None:
        """Launch whatever a graph of the step may launch, between two steps."""
        self.mlps.end()
        for mlp in self.mlps.mlps:
            mlp.compute(self.hidden_TD, always=True)
        self.run(reduced=True, restarts=False)

    def run(self, *, reduced: bool, keep: bool = False, restarts: bool = True) -> list[Tensor]:
        """Run the step from its start; returns the inputs of all MLPs where they are asked for, else the last stream alone."""
        stream_TD, kept = self.hidden_TD, []
        if reduced and restarts:
            restart(self.mlps.state, self.floor_T)
        for layer in range(self.shape.num_layers):
            stream_TD = stream_TD + self.attend(layer, functional.rms_norm(stream_TD, stream_TD.shape[-1:]))
            normed_TD = functional.rms_norm(stream_TD, stream_TD.shape[-1:])
            if reduced:
                added_TD = self.mlps.mlps[layer].compute(normed_TD)
            else:
                gate_up, down, _ = self.mlps.weights[layer]
                added_TD = run_dense(normed_TD, gate_up=gate_up, down=down)
            if reduced and layer in self.layers:
                self.mlps.state.observe(layer, added_TD, stream_TD)
            stream_TD = stream_TD + added_TD
            if keep:
                kept.append(normed_TD)
        return kept if keep else [stream_TD]

    @property
    def can_expect(self) -> bool:
        """Whether a layer's cache fits the memory in float64 beside all else."""
        return 16 * self.keys[0].numel() < 8 << 30

    def expect(self, plan: Plan) -> Tensor:
        """Return the last stream (T, D) in float64, by the definition of the levels."""
        levels = plan.case.get_levels(self.num_tokens)
        exits = None if plan.exits_at is None else self.layers[EXITS.index(plan.exits_at)]
        stream_TD = self.hidden_TD.double()
        for layer in range(self.shape.num_layers):
            stream_TD = stream_TD + self.attend(layer, functional.rms_norm(stream_TD, stream_TD.shape[-1:]))
            now = [SKIP] * len(levels) if exits is not None and layer > exits else levels
            stream_TD = stream_TD + self.mlps.expect(layer, functional.rms_norm(stream_TD, stream_TD.shape[-1:]), now)[0]
        return stream_TD

    def get_bound(self, plan: Plan, ceilings: Ceilings) -> float:
        """Return what the plan ideally costs as a share of the dense step, if time were bytes or FLOPs, part by part."""
        read, compute = ceilings.bytes_per_second, ceilings.flops_per_second
        shape, count = self.shape, self.num_tokens
        attention = self.qkv[0].numel() + self.out[0].numel()
        cache = 2 * count * shape.num_kv_heads * self.cache_size * shape.head_size
        mlp = 3 * shape.hidden_size * shape.num_neurons
        rest = max(2 * attention / read, 2 * attention * count / compute) + 2 * cache / read
        whole = max(2 * mlp / read, 2 * mlp * count / compute)
        share = plan.case.get_ideal(shape, count, ceilings)
        if plan.exits_at is not None:
            share = (self.layers[EXITS.index(plan.exits_at)] + 1) / shape.num_layers
        return (rest + share * whole) / (rest + whole)
