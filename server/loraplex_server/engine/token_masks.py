"""Which tokens the grammars of a step's rows allow, found while the model computes the step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray

from .request import Request

__all__ = ["TokenMasks"]


class TokenMasks:
    """Owner of the masks' memory and of the thread that fills it. Engine thread.

    A mask depends on the tokens before the step alone, so it needs nothing of the forward.
    """

    def __init__(self, n_rows: int, vocab_size: int) -> None:
        self._masks: NDArray[np.int32] = np.empty((n_rows, -(-vocab_size // 32)), dtype=np.int32)
        self._vocab_size = vocab_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loraplex-masks")
        self._executor: LLExecutor | None = None  # with threads of its own; made when needed
        self._pending: Future[None] | None = None
        self._n_rows = 0

    def start(self, requests: Sequence[Request]) -> None:
        """Begins with the rows of these requests, each of which gets a token in this step."""
        self.wait()
        rows = [
            (request.constraint.matcher, row)
            for row, request in enumerate(requests)
            if request.constraint is not None and request.constraint.forced is None
        ]
        if not rows:
            self._n_rows = 0
            return
        if self._executor is None:
            self._executor = LLExecutor(num_threads=max(1, min(8, (os.cpu_count() or 2) // 2)))
        self._n_rows = len(requests)
        masks = self._masks[: self._n_rows]
        masks.fill(-1)  # rows without a grammar: all tokens
        self._pending = self._thread.submit(
            fill_next_token_bitmask_par, self._executor, rows, masks
        )

    def wait(self) -> NDArray[np.int32] | None:
        """int32 [n_requests, ceil(vocab_size / 32)], bit i % 32 of word i // 32 for token i.

        None if no row has a grammar. Valid until the next ``start``.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        return self._masks[: self._n_rows] if self._n_rows else None

    def close(self) -> None:
        self._thread.shutdown()
