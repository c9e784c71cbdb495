"""Holds what the engine learns from: tokens with a target and a weight at each position."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Datum:
    """A sequence to learn from. All tensors are on the CPU and have n entries."""

    tokens: Tensor  # int64, the inputs
    targets: Tensor  # int64, the token that each position predicts
    weights: Tensor  # float32, 0 = the position has no loss
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Float32 values a position that a loss reads besides, as "logprobs" and "advantages"."""

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of_chat(cls, tokens: Sequence[int], learn: Sequence[bool]) -> "Datum":
        """Return the datum of a text. ``learn``: for each token, whether it is to be predicted."""
        ids = torch.tensor(tokens)
        return cls(ids[:-1], ids[1:], torch.tensor(learn[1:], dtype=torch.float32))

    @property
    def n_answers(self) -> int:
        return int((self.weights != 0).sum())

    @property
    def n_quiet(self) -> int:
        """The number of positions before the first one with a loss."""
        at = self.weights.nonzero()
        return len(self) if len(at) == 0 else int(at[0])


Loss = Callable[[Tensor, Datum], Tensor]
"""Maps log-probabilities of the targets, float32 [n], and their datum to the summed loss.

A position whose weight is 0 has the log-probability 0.
"""
