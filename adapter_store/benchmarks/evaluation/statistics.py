"""Paired bootstrap over clusters of tasks, and the recovery of an oracle's gain."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Difference", "clustered_mean", "paired_difference", "recovery"]


class Difference(NamedTuple):
    mean: float
    low: float  # 2.5th percentile of the bootstrap
    high: float  # 97.5th


def recovery(base: float, value: float, oracle: float) -> float:
    """ρ = (base − value) / (base − oracle) for a loss: 0 is the base, 1 the oracle."""
    return (base - value) / (base - oracle) if base != oracle else 0.0


def clustered_mean(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    n_draws: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Mean of the values with its 95 % interval; whole clusters are drawn, with repetition.

    Values of one cluster (tasks of one operation, draws of one task) say much the same, so they
    count as one draw. Raises ValueError for no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    names = list(dict.fromkeys(clusters))
    index = {name: i for i, name in enumerate(names)}
    owner = np.array([index[name] for name in clusters])
    totals = np.bincount(owner, weights=np.asarray(values, dtype=float))
    sizes = np.bincount(owner)
    drawn = np.random.default_rng(seed).integers(len(names), size=(n_draws, len(names)))
    means = totals[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(np.mean(values)), float(low), float(high))


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    n_draws: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Mean of a − b with its 95 % interval, as `clustered_mean` has it."""
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    return clustered_mean(gaps, clusters, n_draws=n_draws, seed=seed)
