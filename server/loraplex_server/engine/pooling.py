"""Vectors from hidden states: what a request asks for, and how its chunks are put together.

Every sum is in float64 over single rows, so that a vector is the same however the text was cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraplex_adapter_store.plan import HeadPlan, HeadTask, PoolingMode

__all__ = ["PooledRows", "Pooling"]


@dataclass(frozen=True, slots=True)
class Pooling:
    """What a request that generates nothing reads: ``mode`` None is a row for each token."""

    mode: PoolingMode | None
    head: HeadPlan | None = None  # logits of these rows instead of hidden states

    @staticmethod
    def of_head(head: HeadPlan) -> Pooling:
        """As transformers' classes read it: the last token, or each."""
        return Pooling(PoolingMode.LAST if head.task is HeadTask.SEQ_CLS else None, head)

    @property
    def reads_all_rows(self) -> bool:
        """Whether every token has to be computed, also one that is in the prefix cache."""
        return self.mode is not PoolingMode.LAST


@dataclass(slots=True)
class PooledRows:
    """Of one request, while its prompt is prefilled. Engine thread only."""

    pooling: Pooling
    n_rows: int = 0
    _vector: Tensor | None = None  # float64 [width]; LAST, CLS, MAX: of a row as it is
    _rows: list[Tensor] = field(default_factory=list)  # where each token has its own

    def add(self, rows: Tensor) -> None:
        """``rows`` float32 [n, hidden_size]: the next tokens of the prompt, in order."""
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
                places = torch.arange(1, len(rows) + 1, dtype=torch.float64) + self.n_rows
                self._sum(places @ rows.double())
            case PoolingMode.MEAN | PoolingMode.MEAN_SQRT_LEN:
                self._sum(rows.double().sum(0))
        self.n_rows += len(rows)

    def result(self) -> Tensor:
        """float32 [width], or [n_tokens, width] where each token has its own."""
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

    def _sum(self, of_chunk: Tensor) -> None:
        self._vector = of_chunk if self._vector is None else self._vector + of_chunk

    def _of_head(self, rows: Tensor) -> Tensor:
        return rows if self.pooling.head is None else self.pooling.head.logits(rows)
