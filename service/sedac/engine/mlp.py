"""The gated MLP: computes only the rows whose token has not exited; the others get zero, so the stream passes through.

`attach` swaps an MLP's class; weights, names and the base class's own forward stay in use. Works for any module that maps
(T, D) to (T, D) row by row, dense or mixture of experts. T tokens, D hidden size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from vllm.utils.torch_utils import direct_register_custom_op

from sedac.engine.state import State

_MLPS: dict[str, nn.Module] = {}
"""by module name; operators can carry names, not objects"""


def _compute(mlp: Any, base: type[nn.Module], x_TD: Tensor) -> Tensor:
    rows: Tensor | None = mlp.sedac_state.kept_rows
    if rows is None:
        return base.forward(mlp, x_TD)
    out_TD = torch.zeros_like(x_TD)
    if rows.numel():
        out_TD.index_copy_(0, rows, base.forward(mlp, x_TD.index_select(0, rows)))
    return out_TD


def _gated_mlp(x_TD: Tensor, exited_T: Tensor, mlp_name: str) -> Tensor:
    mlp = _MLPS[mlp_name]
    return _compute(mlp, type(mlp).__bases__[0], x_TD)


def _gated_mlp_fake(x_TD: Tensor, exited_T: Tensor, mlp_name: str) -> Tensor:
    return torch.empty_like(x_TD)


direct_register_custom_op("sedac_gated_mlp", _gated_mlp, fake_impl=_gated_mlp_fake)


@functools.cache
def _gated(base: Any) -> type[nn.Module]:
    def forward(self: Any, x_TD: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            out_TD: Tensor = torch.ops.vllm.sedac_gated_mlp(x_TD, self.sedac_exited_T, self.sedac_name)
            return out_TD
        return _compute(self, base, x_TD)

    return type(f"Gated{base.__name__}", (base,), {"forward": forward, "__module__": base.__module__})


def warm_up(mlp: Any, hidden_size: int, dtype: torch.dtype) -> None:
    """Run the base MLP on one and on two rows, so that what vLLM compiles inside it by size is ready before requests come."""
    base: Any = type(mlp).__bases__[0]
    with torch.inference_mode():
        for rows in (1, 2):
            base.forward(mlp, torch.zeros(rows, hidden_size, dtype=dtype, device=mlp.sedac_exited_T.device))


def attach(mlp: Any, name: str, state: State) -> None:
    """Gate the MLP called `name` in the model."""
    _MLPS[name] = mlp
    mlp.sedac_name = name
    mlp.sedac_state = state
    mlp.register_buffer("sedac_exited_T", state.exited_T, persistent=False)
    base: Any = type(mlp)
    mlp.__class__ = _gated(base)
