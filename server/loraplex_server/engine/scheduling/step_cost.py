"""Estimates the seconds of a step from its chunks, fitted to the steps before.

    seconds ≈ fixed + rows·r + context·k + tokens·t + pairs·p

``rows`` are decoding requests and ``context`` the positions that they read. ``tokens`` are those of
prompt chunks and ``pairs`` the (token, position) pairs of their attention. The five coefficients
follow the squared relative errors of recent steps downhill, so a step that took unusually long has
little weight. A coefficient that recent steps say nothing about keeps its value.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

_KEPT = 0.98  # weight of a step's error, relative to the next step's
_DAMPING = 1.0  # the weight, in steps, of a coefficient's last value
_LEAST = 1e-3  # of a coefficient, relative to the prior
_FIXED_S, _ROW_S, _TOKEN_S = 0.02, 0.002, 0.001
_READ_BYTES_PER_S = 2e9  # slow, so that the first steps with long contexts are short ones
_N_SHARED_READS = 16  # tokens of a prompt chunk that share a read of the KV cache


class Chunk(Protocol):
    """The tokens [start, start + n_tokens) of a request."""

    @property
    def start(self) -> int: ...

    @property
    def n_tokens(self) -> int: ...


class StepCost:
    """The estimate. ``measured`` improves it after each step."""

    def __init__(self, kv_token_bytes: int) -> None:
        """``kv_token_bytes``: memory that attention reads for a position of the context."""
        read_s = kv_token_bytes / _READ_BYTES_PER_S
        prior = (_FIXED_S, _ROW_S, read_s, _TOKEN_S, read_s / _N_SHARED_READS)
        self._prior = np.array(prior)
        self._ratios = np.ones(5)  # of the coefficients to the prior
        self._products = np.zeros((5, 5))
        self._sums = np.zeros(5)
        self._coefficients = list(prior)

    @property
    def fixed_s(self) -> float:
        """The seconds of a step that do not depend on its chunks."""
        return self._coefficients[0]

    def chunk_s(self, start: int, n_tokens: int) -> float:
        """Return the seconds that a chunk adds to a step."""
        _, row_s, context_s, token_s, pair_s = self._coefficients
        if n_tokens == 1:
            return row_s + context_s * (start + 1)
        return n_tokens * (token_s + pair_s * (start + n_tokens / 2))

    def n_fitting(self, start: int, n_tokens: int, seconds: float) -> int:
        """Return how many of the tokens from ``start`` on can be computed in ``seconds``."""
        if self.chunk_s(start, n_tokens) <= seconds:
            return n_tokens
        if n_tokens == 1 or seconds <= 0:
            return 0
        return int(n_tokens * seconds / self.chunk_s(start, n_tokens))  # the first ones cost least

    def measured(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """Fits the coefficients to a step that took ``seconds``."""
        rows = [chunk.start + 1 for chunk in chunks if chunk.n_tokens == 1]
        prompts = [(c.n_tokens, c.start + c.n_tokens / 2) for c in chunks if c.n_tokens > 1]
        n_tokens, n_pairs = sum(n for n, _ in prompts), sum(n * mean for n, mean in prompts)
        step = np.array((1, len(rows), sum(rows), n_tokens, n_pairs)) * self._prior / seconds
        self._products = _KEPT * self._products + np.outer(step, step)
        self._sums = _KEPT * self._sums + step
        ratios = self._ratios
        for index, row in enumerate(self._products):
            slope = self._sums[index] - row @ ratios
            damping = _DAMPING / ratios[index] ** 2
            ratios[index] = max(_LEAST, ratios[index] + slope / (row[index] + damping))
        self._coefficients = (ratios * self._prior).tolist()
