"""Batches of examples of similar length, in an order given by the seed and the step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence


def endless(lengths: Sequence[int], batch_tokens: int, seed: int) -> Iterator[list[int]]:
    """Yield groups of example indices without end, of similar length.

    A group's size times its longest length fits ``batch_tokens``; a longer example is alone. Each
    epoch holds every example once, in new groups.
    """
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
