"""How unlike the training descriptions a description is, and above which score it is refused.

    score(x) = 1 − max over operations of cos(W x, W m_o),     W = ((1 − s) C + s tr(C)/d I)^(−1/2)

m_o is the mean wording of an operation, C the covariance of the wordings around these means: what a
format, a language or a style of asking does to a sentence embedding. W shrinks that, so that format
and length hardly affect the score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["OodDetector", "as_new", "class_means", "whitener"]

_SHRINKAGE = 0.2  # s
_N_FOLDS = 5


@dataclass(frozen=True, slots=True)
class OodDetector:
    """Above the limit, a description is refused.

    The limit accepts 95 % of held-out wordings of trained tasks. A wording is held out by fitting
    without a fifth of each operation's phrases and a fifth of the formats', its own among them.
    """

    whiten: Tensor  # float32 [width, width], symmetric: W, its largest entry 1
    operations: Tensor  # float32 [n_operations, width]: W m_o, length 1
    limit: float = math.inf

    @classmethod
    def fit(
        cls,
        sentences: Tensor,
        operations: Sequence[str],
        phrases: Sequence[tuple[str, str]],
        *,
        quantile: float = 0.95,
    ) -> OodDetector:
        """From sentence embeddings [n, width], each with its operation and its two phrases.

        `phrases`: (operation's, format's) of each wording; a format's may be empty.
        """
        scores = torch.zeros(len(sentences))
        for asked, seen in as_new(operations, phrases):
            kept = [operations[i] for i in seen.tolist()]
            scores[asked] = cls.without_limit(sentences[seen], kept).score(sentences[asked])
        guard = cls.without_limit(sentences, operations)
        return replace(guard, limit=float(torch.quantile(scores, quantile)))

    @classmethod
    def without_limit(cls, sentences: Tensor, operations: Sequence[str]) -> OodDetector:
        means, owner = class_means(sentences, operations)
        whiten = whitener(sentences - means[owner])
        whiten /= whiten.abs().max()
        return cls(whiten, F.normalize(means @ whiten, dim=-1))

    def score(self, query: Tensor) -> Tensor:
        """[n], in [0, 2], for sentence embeddings [n, width]."""
        return 1 - self.similarities(query).amax(-1)

    def similarities(self, query: Tensor) -> Tensor:
        """[n, n_operations]: whitened cosines."""
        return F.normalize(query @ self.whiten, dim=-1) @ self.operations.T


def as_new(
    operations: Sequence[str], phrases: Sequence[tuple[str, str]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(asked, seen), int64: every wording is asked once, by those without its phrases.

    A wording that leaves the format unsaid hides no other.
    """
    content = _folds(operations, [phrase for phrase, _ in phrases])
    dressing = _folds([""] * len(phrases), [phrase for _, phrase in phrases])
    says_format = torch.tensor([bool(phrase) for _, phrase in phrases])
    for a in range(_N_FOLDS):
        for b in range(_N_FOLDS):
            asked = (content == a) & (dressing == b)
            seen = (content != a) & ((dressing != b) | ~says_format)
            if asked.any() and seen.any():
                yield asked.nonzero()[:, 0], seen.nonzero()[:, 0]


def class_means(x: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """([n_names, width], in the order in which names appear; int64 [n]: the row of each of x's)."""
    known = list(dict.fromkeys(names))
    owner = torch.tensor([known.index(name) for name in names])
    members = F.one_hot(owner).float()  # [n, n_names]
    return (members.T @ x) / members.sum(0)[:, None], owner


def whitener(spread: Tensor) -> Tensor:
    """W, for the deviations [n, width] from the means."""
    covariance = spread.T @ spread / len(spread)
    variance = covariance.diagonal().mean()
    covariance = torch.lerp(covariance, variance * torch.eye(len(covariance)), _SHRINKAGE)
    values, vectors = torch.linalg.eigh(covariance)
    whiten: Tensor = vectors * values.clamp_min(1e-12).rsqrt() @ vectors.T
    return whiten


def _folds(groups: Sequence[str], names: Sequence[str]) -> Tensor:
    """int64 [n]: the names of each group are assigned to the folds in turn."""
    fold: dict[tuple[str, str], int] = {}
    n_assigned: dict[str, int] = {}
    for group, name in zip(groups, names, strict=True):
        if (group, name) not in fold:
            fold[group, name] = n_assigned.get(group, 0) % _N_FOLDS
            n_assigned[group] = n_assigned.get(group, 0) + 1
    return torch.tensor([fold[key] for key in zip(groups, names, strict=True)])
