"""Losses over the log-probabilities of a datum's targets; each returns a sum, not a mean."""

from torch import Tensor
from torch.nn import functional

from .data import Datum

_CLIP = 0.2  # of PPO's ratio, on both sides


def cross_entropy(logprobs: Tensor, datum: Datum) -> Tensor:
    """Return −Σ weights · logprobs."""
    return -(logprobs * datum.weights).sum()


def importance_sampling(logprobs: Tensor, datum: Datum) -> Tensor:
    """Return −Σ exp(logprobs − old) · advantages.

    ``extra`` has the sampler's ``logprobs`` and the ``advantages``.
    """
    ratio = (logprobs - datum.extra["logprobs"]).exp()
    return -(ratio * datum.extra["advantages"] * datum.weights).sum()


def ppo(logprobs: Tensor, datum: Datum, low: float = 1 - _CLIP, high: float = 1 + _CLIP) -> Tensor:
    """Return PPO's clipped loss (Schulman et al. 2017, formula 7), with ratios in [low, high]."""
    ratio = (logprobs - datum.extra["logprobs"]).exp()
    advantages = datum.extra["advantages"]
    gain = (ratio * advantages).minimum(ratio.clamp(low, high) * advantages)
    return -(gain * datum.weights).sum()


def dpo(chosen: Tensor, rejected: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return the loss of one pair (Rafailov et al. 2023, formula 7).

    ``chosen`` and ``rejected`` are summed log-probabilities of the adapter, ``reference`` is the
    difference chosen − rejected of the base.
    """
    return -functional.logsigmoid(beta * (chosen - rejected - reference))
