"""The mechanisms by which steps run on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex_server.engine.config import EngineConfig

from .step_graphs import CudaGraphCapture, GraphCapture


@dataclass(frozen=True, slots=True)
class StepMode:
    """The mechanisms of a device. The default is that of a CPU."""

    capture: GraphCapture | None = None  # of layers as graphs
    overlaps: bool = False  # the next step is scheduled while one runs

    @staticmethod
    def of(config: EngineConfig, device: torch.device) -> StepMode:
        if device.type == "cpu":
            return StepMode()
        # With several ranks, only rank 0 would know which graph to replay.
        captures = config.cuda_graphs and config.tensor_parallel_size == 1
        return StepMode(
            capture=CudaGraphCapture() if captures else None,
            overlaps=config.async_scheduling,
        )
