"""The four kinds of traffic hold what they promise, seen in their requests."""

from collections import Counter

import numpy as np
import pytest

from research.fleet import TRAFFIC, Workload

WORK = Workload(n_adapters=50, rate_per_s=100.0, n_requests=20_000)


@pytest.mark.parametrize("kind", TRAFFIC)
def test_the_mean_rate_is_as_asked_and_times_are_in_order(kind: str) -> None:
    requests = TRAFFIC[kind](WORK)
    times = [request.time_s for request in requests]
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(100.0, rel=0.01)
    assert requests == TRAFFIC[kind](WORK)
    assert requests != TRAFFIC[kind](WORK._replace(seed=1))
    assert min(r.n_prompt for r in requests) >= 16
    assert np.mean([r.n_prompt for r in requests]) == pytest.approx(160, rel=0.03)
    assert np.mean([r.n_output for r in requests]) == pytest.approx(32, rel=0.03)


def dispersion(kind: str) -> float:
    """Variance over mean of the requests of a second: 1 for a Poisson process."""
    times = [request.time_s for request in TRAFFIC[kind](WORK)]
    counts = np.bincount(np.array(times).astype(int))[:-1]
    return float(counts.var() / counts.mean())


def test_only_zipf_and_flash_crowd_are_a_plain_poisson_process() -> None:
    assert dispersion("zipf") == pytest.approx(1.0, abs=0.3)
    assert dispersion("flash crowd") == pytest.approx(1.0, abs=0.3)
    assert dispersion("diurnal") > 5
    assert dispersion("markov") > 5


def test_popularity_is_zipfs_law() -> None:
    counts = Counter(request.adapter for request in TRAFFIC["zipf"](WORK))
    shares = sorted(counts.values(), reverse=True)
    assert shares[0] / shares[9] == pytest.approx(10, rel=0.25)
    assert len(counts) == 50


def test_a_crowd_asks_for_one_adapter_for_a_while() -> None:
    requests = TRAFFIC["flash crowd"](WORK)
    crowd = WORK.n_adapters * 2 // 3
    calm = [r for r in requests if r.time_s < 90]
    rush = [r for r in requests if 105 < r.time_s < 135]
    assert np.mean([r.adapter == crowd for r in calm]) < 0.1
    assert np.mean([r.adapter == crowd for r in rush]) == pytest.approx(1 / 3, abs=0.05)
