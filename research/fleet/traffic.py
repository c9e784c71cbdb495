"""Four kinds of traffic, those that NVIDIA Dynamo's LoRA placement was tried on.

Popularity is Zipf's everywhere. Arrivals are a Poisson process whose rate is constant (``zipf``),
a day's wave (``diurnal``), or switched between calm and busy (``markov``); in a ``flash crowd`` one
cold adapter suddenly gets a third of the requests.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RANKS = (8, 16, 32, 64)
BYTES_PER_RANK = 37_376  # of the base that costs are fitted on: 4 layers, all linears, bfloat16


class Request(NamedTuple):
    time_s: float
    adapter: int  # its number
    prefix: int  # requests of an adapter with equal prefixes begin alike
    n_prompt: int  # tokens
    n_output: int


class Workload(NamedTuple):
    """What does not depend on the kind of traffic."""

    n_adapters: int
    rate_per_s: float  # mean
    n_requests: int
    seed: int = 0
    exponent: float = 1.0  # of Zipf's law
    n_prefixes: int = 4  # of an adapter
    mean_prompt: int = 160  # tokens
    mean_output: int = 32

    def rank(self, adapter: int) -> int:
        return RANKS[adapter % len(RANKS)]

    def n_bytes(self, adapter: int) -> int:
        return self.rank(adapter) * BYTES_PER_RANK

    @property
    def duration_s(self) -> float:
        return self.n_requests / self.rate_per_s


def zipf(work: Workload) -> list[Request]:
    return _requests(work, lambda t: np.ones_like(t))


def diurnal(work: Workload) -> list[Request]:
    """Two days in the time there is; nights have a fifth of the rate of days."""
    return _requests(work, lambda t: 1 + 2 / 3 * np.sin(4 * math.pi * t / work.duration_s))


def flash_crowd(work: Workload) -> list[Request]:
    """From the middle on, for a fifth of the time, a third of all requests ask for one adapter."""
    requests = _requests(work, lambda t: np.ones_like(t))
    rng = np.random.default_rng(work.seed + 1)
    crowd = work.n_adapters * 2 // 3  # cold until then
    begin, end = 0.5 * work.duration_s, 0.7 * work.duration_s
    return [
        r._replace(adapter=crowd) if begin <= r.time_s < end and rng.random() < 1 / 3 else r
        for r in requests
    ]


def markov(work: Workload) -> list[Request]:
    """A Markov-modulated Poisson process: calm and busy, busy three times as fast, 20 changes."""
    rng = np.random.default_rng(work.seed + 2)
    ends = np.cumsum(rng.exponential(work.duration_s / 20, size=200))

    def rate(t: np.ndarray) -> np.ndarray:
        return np.where(np.searchsorted(ends, t) % 2 == 0, 0.5, 1.5)

    return _requests(work, rate)


TRAFFIC: dict[str, Callable[[Workload], list[Request]]] = {
    "zipf": zipf,
    "diurnal": diurnal,
    "flash crowd": flash_crowd,
    "markov": markov,
}


def _requests(work: Workload, rate: Callable[[np.ndarray], np.ndarray]) -> list[Request]:
    rng = np.random.default_rng(work.seed)
    n = work.n_requests
    times = _arrivals(rng, work, rate)
    popularity = np.arange(1, work.n_adapters + 1, dtype=float) ** -work.exponent
    cumulated = np.cumsum(popularity / popularity.sum())
    numbers = np.minimum(np.searchsorted(cumulated, rng.random(n)), work.n_adapters - 1)
    shuffled = rng.permutation(work.n_adapters)  # so that ranks and popularity are independent
    # Lengths are skewed: a gamma with shape 2.
    prompts = 16 + rng.gamma(2.0, (work.mean_prompt - 16) / 2.0, n)
    outputs = 1 + rng.gamma(2.0, (work.mean_output - 1) / 2.0, n)
    prefixes = rng.integers(work.n_prefixes, size=n)
    columns: Sequence[Sequence[float]] = (
        times.tolist(),
        shuffled[numbers].tolist(),
        prefixes.tolist(),
        prompts.astype(int).tolist(),
        outputs.astype(int).tolist(),
    )
    return [
        Request(t, int(a), int(p), int(i), int(o)) for t, a, p, i, o in zip(*columns, strict=True)
    ]


def _arrivals(
    rng: np.random.Generator, work: Workload, rate: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """A Poisson process of rate ``rate(t)``, by the inverse of the integrated rate; ``rate`` is
    relative and scaled so that its mean is the workload's."""
    grid = np.linspace(0.0, work.duration_s, 20_001)
    integral = np.concatenate([[0.0], np.cumsum(rate(grid[:-1]) * np.diff(grid))])
    unit = np.cumsum(rng.exponential(1.0, work.n_requests))
    times: np.ndarray = np.interp(unit * integral[-1] / unit[-1], integral, grid)
    return times
