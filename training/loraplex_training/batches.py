"""Batches of examples of similar length, in an order given by the seed and the step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .examples import Example

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # torch's label for "no loss here"


class Batch(NamedTuple):
    tokens: Tensor  # [rows, length], right-padded
    mask: Tensor  # [rows, length], 1 where a token is real
    labels: Tensor  # [rows, length], the next token if it is to be learnt, else IGNORED


def grouped(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return groups of example indices of similar length.

    A group's size times its longest length fits ``batch_tokens``; a longer example is alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return _cut(order, lengths, batch_tokens)


def endless(lengths: Sequence[int], batch_tokens: int, seed: int) -> Iterator[list[int]]:
    """Yield groups without end. Each epoch holds every example once, in new groups."""
    for epoch in itertools.count():
        rng = random.Random(f"{seed}-{epoch}")
        # Noise on the lengths mixes neighbours and adds little padding.
        noisy = [length * rng.uniform(0.9, 1.1) for length in lengths]
        order = sorted(range(len(lengths)), key=lambda i: (-noisy[i], i))
        groups = _cut(order, lengths, batch_tokens)
        rng.shuffle(groups)
        yield from groups


def _cut(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = []
    longest = 0  # longest example of the last group
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
