"""The learning rate over a run."""

import math

_FINAL = 0.1


def rate_share(step: int, n_steps: int, n_warmup: int) -> float:
    """Return the share of the learning rate at a step, which counts from 0.

    It rises linearly over ``n_warmup`` steps and then follows a cosine from 1 to a tenth.
    """
    if step < n_warmup:
        return (step + 1) / n_warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))
    return _FINAL + (1 - _FINAL) * cosine
