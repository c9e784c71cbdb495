"""Intervals against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from adapter_store.benchmarks.evaluation.statistics import (
    clustered_mean,
    paired_difference,
    recovery,
)


def test_clusters_of_one_give_scipys_percentile_interval() -> None:
    values = np.random.default_rng(1).normal(2.0, 1.0, 40)
    ours = clustered_mean(list(values), range(40))
    scipys = bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, rng=2
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(scipys.low, abs=0.02)
    assert ours.high == pytest.approx(scipys.high, abs=0.02)


def test_clusters_of_many_sizes_give_scipys_interval_of_a_ratio_of_sums() -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 6, 25)
    groups = [rng.normal(rng.normal(), 0.3, size) for size in sizes]
    clusters = np.repeat(np.arange(25), sizes)
    ours = clustered_mean(list(np.concatenate(groups)), list(clusters))
    totals = np.array([group.sum() for group in groups])
    scipys = bootstrap(
        (totals, sizes.astype(float)),
        lambda total, size, axis=-1: total.sum(axis) / size.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=4,
    ).confidence_interval
    assert ours.low == pytest.approx(scipys.low, abs=0.03)
    assert ours.high == pytest.approx(scipys.high, abs=0.03)


def test_saying_the_same_twice_makes_no_interval_narrower() -> None:
    values = list(np.random.default_rng(5).normal(size=12))
    once = clustered_mean(values, range(12))
    thrice = clustered_mean([v for v in values for _ in range(3)], [i // 3 for i in range(36)])
    naive = clustered_mean([v for v in values for _ in range(3)], range(36))
    assert thrice.low == pytest.approx(once.low)
    assert thrice.high == pytest.approx(once.high)
    assert naive.high - naive.low < 0.7 * (once.high - once.low)


def test_an_interval_holds_the_truth_about_nineteen_times_in_twenty() -> None:
    """Two hundred samples of sixty operations with four tasks each."""
    rng = np.random.default_rng(6)
    held = 0
    for seed in range(200):
        values = np.repeat(rng.normal(size=60), 4) + rng.normal(0, 0.5, 240)
        found = clustered_mean(list(values), list(np.arange(240) // 4), n_draws=400, seed=seed)
        held += found.low <= 0.0 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_pairs_take_out_what_tasks_have_in_common() -> None:
    rng = np.random.default_rng(7)
    hard = rng.normal(0, 10, 30)
    gap = paired_difference(list(hard + 1), list(hard), range(30))
    assert gap == pytest.approx((1.0, 1.0, 1.0))


def test_no_values_have_no_interval() -> None:
    with pytest.raises(ValueError, match="at least one"):
        clustered_mean([], [])


def test_recovery_is_zero_at_the_base_and_one_at_the_oracle() -> None:
    assert recovery(4.0, 4.0, 1.0) == 0.0
    assert recovery(4.0, 1.0, 1.0) == 1.0
    assert recovery(4.0, 2.5, 1.0) == 0.5
