"""How often each token came in a request, kept up while it grows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["TokenCounts"]


class TokenCounts:
    """Of one request. Engine thread. A step costs its new tokens alone."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}  # of a token in the arrays
        self._tokens: NDArray[np.int32] = np.empty(64, dtype=np.int32)
        self._counts: NDArray[np.int32] = np.empty(64, dtype=np.int32)
        self._n_known = 0

    def update(self, token_ids: list[int], n_prompt: int) -> None:
        """``token_ids``: the request's, [virtual | prompt | output]; they only grow."""
        for position in range(self._n_known, len(token_ids)):
            if token_ids[position] >= 0:
                place = self._place_of(token_ids[position])  # which may move the arrays
                self._counts[place] += position >= n_prompt
        self._n_known = len(token_ids)

    @property
    def tokens(self) -> NDArray[np.int32]:
        """[n], each once."""
        return self._tokens[: len(self._place)]

    @property
    def counts(self) -> NDArray[np.int32]:
        """[n]: times in the output; 0 = in the prompt alone."""
        return self._counts[: len(self._place)]

    def place(self, token_id: int) -> int | None:
        """Of a token in ``tokens``."""
        return self._place.get(token_id)

    def _place_of(self, token_id: int) -> int:
        place = self._place.get(token_id)
        if place is None:
            place = self._place[token_id] = len(self._place)
            if place == len(self._tokens):
                self._tokens = np.concatenate((self._tokens, self._tokens))
                self._counts = np.concatenate((self._counts, self._counts))
            self._tokens[place], self._counts[place] = token_id, 0
        return place
