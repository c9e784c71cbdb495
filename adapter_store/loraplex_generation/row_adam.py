"""Adam on the rows of a matrix, stepping only the rows that a batch touched."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RowAdam"]


class RowAdam:
    """Rows are sums' parts: a language is in few batches, the mean in all. Plain Adam would keep
    moving absent rows by their momentum and mis-scale their second moments.
    """

    def __init__(self, rows: Tensor, *, betas: tuple[float, float] = (0.9, 0.98)) -> None:
        self.rows = rows  # [n_rows, size], updated in place
        self._betas = betas
        self._mean = torch.zeros_like(rows)
        self._square = torch.zeros_like(rows)
        self._steps = torch.zeros(len(rows))

    @torch.no_grad()
    def step(self, gradient: Tensor, touched: Tensor, *, lr: float) -> None:
        """`touched` int64: indices of the rows to move."""
        b1, b2 = self._betas
        for i in touched.tolist():
            g = gradient[i]
            self._steps[i] += 1
            n = float(self._steps[i])
            self._mean[i].lerp_(g, 1 - b1)
            self._square[i].mul_(b2).addcmul_(g, g, value=1 - b2)
            scale = (self._square[i] / (1 - b2**n)).sqrt_().add_(1e-8)
            self.rows[i].addcdiv_(self._mean[i], scale, value=-lr / (1 - b1**n))

    def state(self) -> dict[str, Tensor]:
        return {"mean": self._mean, "square": self._square, "steps": self._steps}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._mean.copy_(state["mean"])
        self._square.copy_(state["square"])
        self._steps.copy_(state["steps"])
