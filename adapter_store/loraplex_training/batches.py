"""Batches of about equal length, in an order that depends on the seed and the step alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .examples import Example

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["IGNORED", "Batch", "batch_of", "endless", "grouped"]

IGNORED = -100  # torch's label for "no loss here"


class Batch(NamedTuple):
    tokens: Tensor  # [rows, length], right-padded
    mask: Tensor  # [rows, length], 1 where a token is real
    labels: Tensor  # [rows, length], the next token where it is to be learnt, else IGNORED


def grouped(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Example indices of similar length; the size of a group times its longest fits
    ``batch_tokens``. An example longer than that has a group of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return _cut(order, lengths, batch_tokens)


def endless(lengths: Sequence[int], batch_tokens: int, seed: int) -> Iterator[list[int]]:
    """Epoch after epoch, every example once each; who shares a batch changes by the epoch."""
    for epoch in itertools.count():
        rng = random.Random(f"{seed}-{epoch}")
        # Noise on the length mixes neighbours without padding much.
        noisy = [length * rng.uniform(0.9, 1.1) for length in lengths]
        order = sorted(range(len(lengths)), key=lambda i: (-noisy[i], i))
        groups = _cut(order, lengths, batch_tokens)
        rng.shuffle(groups)
        yield from groups


def _cut(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = []
    longest = 0  # of the last group
    for i in order:
        longest = max(longest, lengths[i])
        if groups and (len(groups[-1]) + 1) * longest <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
            longest = lengths[i]
    return groups


def batch_of(examples: Sequence[Example], pad_id: int, device: str) -> Batch:
    import torch

    length = max(len(example) for example in examples)
    shape = (len(examples), length)
    tokens = torch.full(shape, pad_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for row, example in enumerate(examples):
        n = len(example)
        ids = torch.tensor(example.tokens)
        tokens[row, :n] = ids
        mask[row, :n] = 1
        learn = torch.tensor(example.learn[1:])
        labels[row, : n - 1] = torch.where(learn, ids[1:], IGNORED)
    return Batch(tokens.to(device), mask.to(device), labels.to(device))
