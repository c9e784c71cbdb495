"""Vectors from hidden states: the kind of pooling, and the pooled chunks of a request.

Sums are in float64 over single rows, so a vector does not depend on how its text was chunked.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraplex_adapter_store.plan import HeadPlan, HeadTask, PoolingMode


@dataclass(frozen=True, slots=True)
class Pooling:
    """The vectors that a request asks for. ``mode`` None means one row for each token."""

    mode: PoolingMode | None
    head: HeadPlan | None = None  # its logits replace the hidden states

    @staticmethod
    def of_head(head: HeadPlan) -> Pooling:
        """Return the pooling of transformers' classification classes: the last token, or each."""
        return Pooling(PoolingMode.LAST if head.task is HeadTask.SEQ_CLS else None, head)

    @property
    def reads_all_rows(self) -> bool:
        """Return True if every token has to be computed, prefix cache or not."""
        return self.mode is not PoolingMode.LAST


@dataclass(slots=True)
class PooledRows:
    """The pooled rows of one request during its prefill. Engine thread only."""

    pooling: Pooling
    n_rows: int = 0
    _vector: Tensor | None = None  # float64 [width]
    _rows: list[Tensor] = field(default_factory=list)  # with mode None

    def add(self, rows: Tensor) -> None:
        """Add the hidden states of the prompt's next tokens, float32 [n, hidden_size]."""
        if not len(rows):
            return
        match self.pooling.mode:
            case None:
                self._rows.append(self._of_head(rows))
            case PoolingMode.LAST:
                self._vector = rows[-1].double()
            case PoolingMode.CLS:
                self._vector = rows[0].double() if self._vector is None else self._vector
            case PoolingMode.MAX:
                top = rows.amax(0).double()
                self._vector = top if self._vector is None else torch.maximum(self._vector, top)
            case PoolingMode.WEIGHTED_MEAN:
                weights = torch.arange(1, len(rows) + 1, dtype=torch.float64) + self.n_rows
                self._sum(weights @ rows.double())
            case PoolingMode.MEAN | PoolingMode.MEAN_SQRT_LEN:
                self._sum(rows.double().sum(0))
        self.n_rows += len(rows)

    def result(self) -> Tensor:
        """Return float32 [width], or [n_tokens, width] with mode None."""
        if self.pooling.mode is None:
            return torch.cat(self._rows)
        assert self._vector is not None
        n = self.n_rows
        divisors = {
            PoolingMode.MEAN: float(n),
            PoolingMode.MEAN_SQRT_LEN: float(n) ** 0.5,
            PoolingMode.WEIGHTED_MEAN: n * (n + 1) / 2,
        }
        vector = (self._vector / divisors.get(self.pooling.mode, 1.0)).float()
        return self._of_head(vector.unsqueeze(0))[0]

    def _sum(self, chunk_sum: Tensor) -> None:
        self._vector = chunk_sum if self._vector is None else self._vector + chunk_sum

    def _of_head(self, rows: Tensor) -> Tensor:
        return rows if self.pooling.head is None else self.pooling.head.logits(rows)
