"""Attention metadata of draft passes: one new token per drafting sequence, on the block tables of the running batch.

N drafting sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sedac.engine.drafting.parts import CommonAttentionMetadata


class DraftAttention:
    """Builds the metadata of every KV cache group that the draft's layers belong to."""

    def __init__(self, runner: Any, layer_names: Iterable[str]) -> None:
        """`layer_names` are those of the draft's attention layers; the runner's KV cache exists."""
        wanted = set(layer_names)
        self._runner = runner
        self._groups: list[tuple[int, Any, list[str]]] = []
        """Number of the KV cache group, metadata builder and names of the layers, per group."""
        for number, groups in enumerate(runner.attn_groups):
            for group in groups:
                names = [name for name in group.layer_names if name in wanted]
                if names:
                    self._groups.append((number, group.get_metadata_builder(), names))
        self.num_groups = len(self._groups)
        self._starts = torch.arange(runner.max_num_reqs + 1, dtype=torch.int32, device=runner.device)
        self._starts_cpu = torch.arange(runner.max_num_reqs + 1, dtype=torch.int32)
        self._tables: dict[int, Tensor] = {}

    def begin(self, rows: list[int] | None) -> None:
        """Take the block tables of these rows of the batch; None: of all."""
        batch = self._runner.input_batch
        self._tables = {}
        for number, _, _ in self._groups:
            if number not in self._tables:
                table = batch.block_table[number].get_device_tensor(batch.num_reqs)
                self._tables[number] = table if rows is None else table[torch.tensor(rows, device=table.device)]

    def keep(self, kept_N: Tensor) -> None:
        """Go on with these of the sequences (bool, or their numbers)."""
        self._tables = {number: table[kept_N] for number, table in self._tables.items()}

    def build(self, positions_N: Tensor, max_position: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the metadata and the slots (N,) by layer name for one token per sequence at `positions_N` (int64)."""
        num = positions_N.shape[0]
        seq_lens_N = (positions_N + 1).to(torch.int32)
        metadata: dict[str, Any] = {}
        slots: dict[str, Tensor] = {}
        slots_of: dict[int, Tensor] = {}
        for number, builder, names in self._groups:
            table = self._tables[number]
            if number not in slots_of:
                size = self._runner.input_batch.block_table[number].block_size
                blocks_N = table.gather(1, (positions_N // size)[:, None])[:, 0].long()
                slots_of[number] = blocks_N * size + positions_N % size
            common = CommonAttentionMetadata(
                query_start_loc=self._starts[: num + 1],
                query_start_loc_cpu=self._starts_cpu[: num + 1],
                seq_lens=seq_lens_N,
                num_reqs=num,
                num_actual_tokens=num,
                max_query_len=1,
                max_seq_len=max_position + 1,
                block_table_tensor=table,
                slot_mapping=slots_of[number],
                causal=True,
            )
            built = builder.build(0, common)
            for name in names:
                metadata[name], slots[name] = built, slots_of[number]
        return metadata, slots
