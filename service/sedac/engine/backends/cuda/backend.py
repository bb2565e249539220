"""The backend on a GPU: Triton kernels that decide and compute there. device.py has its passes, gated.py its MLPs."""

from __future__ import annotations

from typing import Any

from sedac.engine.backends.cuda.device import DeviceBackend
from sedac.probe.levels import Neurons


class CudaBackend(DeviceBackend):
    """All of the seam on a GPU; see `Backend`."""

    def attach_mlp(self, module: Any, name: str, layer: int, neurons: Neurons | None, *, scores_activation: bool, lora: bool) -> None:
        """Gate an MLP; see `Backend`."""
        from sedac.engine.backends.cuda.gated import CudaMlp  # needs vLLM, which the rest does not (benchmarks/cuda on a bare machine)

        self.mlps.append(CudaMlp(self, module, name, layer, neurons, scores_activation=scores_activation, lora=lora))
