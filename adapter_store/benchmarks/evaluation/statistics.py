"""Paired bootstrap over tasks, and the recovery of an oracle's gain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Difference", "paired_difference", "recovery"]


class Difference(NamedTuple):
    mean: float
    low: float  # 2.5th percentile of the bootstrap
    high: float  # 97.5th


def recovery(base: float, value: float, oracle: float) -> float:
    """ρ = (base − value) / (base − oracle) for a loss: 0 is the base, 1 the oracle."""
    return (base - value) / (base - oracle) if base != oracle else 0.0


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, n_draws: int = 10_000, seed: int = 0
) -> Difference:
    """Mean of a − b with its 95 % interval; the task is the unit."""
    gap = np.asarray(a) - np.asarray(b)
    draws = np.random.default_rng(seed).integers(len(gap), size=(n_draws, len(gap)))
    means = gap[draws].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(gap.mean()), float(low), float(high))
