"""Chooses an adapter or none for a text, by kernel ridge regression on few labelled texts.

    k(x, y) = exp(γ (cos(x, y) − 1)) + β · words(x)·words(y)
    f = k(·, T) (K + λ D)⁻¹ Y        one output per adapter, and one for "none"

D weights the texts so that all adapters count alike, whatever their number of examples. Ridge
regression gives its own leave-one-out predictions without refitting,

    f₋ᵢ(xᵢ) = yᵢ − αᵢ / [(K + λ D)⁻¹]ᵢᵢ,

so each fit calibrates the threshold on unseen texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_GAMMA = 2.0
_BETA = 0.3
_RIDGE = 0.3
_NONE_WEIGHT = 2.0  # weight of texts for no adapter; one adapter has 1
_FALSE_PICKS = 0.02  # share of unrelated texts that may be given an adapter


@dataclass(frozen=True, slots=True)
class Features:
    meaning: Tensor  # float32 [n, dim], unit length
    words: Tensor  # float32 [n, N_LEXICAL_FEATURES], unit length

    def __len__(self) -> int:
        return int(self.meaning.shape[0])

    def kernel(self, other: Features) -> Tensor:
        """Return the kernel [n, n_other] of these texts and the other texts."""
        near = torch.exp(_GAMMA * (self.meaning @ other.meaning.T - 1.0))
        return near + _BETA * (self.words @ other.words.T)


@dataclass(frozen=True, slots=True)
class Calibration:
    """The threshold and error rates of a fit, from its leave-one-out predictions."""

    threshold: float  # on the margin: score of the best adapter − score of "none"
    right: float  # share of adapters' texts that are given to their adapter
    false_picks: float  # share of unrelated texts that are given to an adapter


class TextClassifier:
    """A fitted classifier. Immutable. Texts of class ``n_classes`` belong to no adapter."""

    def __init__(self, texts: Features, labels: Sequence[int], n_classes: int) -> None:
        if n_classes < 1 or len(texts) != len(labels):
            raise ValueError(f"{len(texts)} texts, {len(labels)} labels, {n_classes} classes")
        self.n_classes = n_classes
        self._texts = texts
        label = torch.tensor(labels)
        counts = torch.bincount(label, minlength=n_classes + 1).double()
        weight = 1.0 / counts[label]
        weight /= weight.mean()
        weight[label == n_classes] *= _NONE_WEIGHT
        targets = torch.nn.functional.one_hot(label, n_classes + 1).double()
        system = texts.kernel(texts).double() + _RIDGE * torch.diag(1.0 / weight)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
        alpha = torch.zeros_like(targets).index_add_(1, label, inverse)  # inverse @ targets
        self._alpha = alpha.float()
        unseen = targets - alpha / inverse.diagonal().unsqueeze(1)
        self.calibration = _calibrate(unseen, label, n_classes)

    def scores(self, texts: Features) -> Tensor:
        """Return float32 [n, n_classes + 1]: about 1 for the text's class, about 0 for others."""
        scores: Tensor = texts.kernel(self._texts) @ self._alpha
        return scores


def _calibrate(unseen: Tensor, label: Tensor, n_classes: int) -> Calibration:
    best, choice = unseen[:, :n_classes].max(dim=1)
    margin = best - unseen[:, n_classes]
    unrelated = label == n_classes
    threshold = 0.0
    if bool(unrelated.any()):
        ordered = margin[unrelated].sort(descending=True).values
        threshold = float(ordered[int(_FALSE_PICKS * len(ordered))])
    picked = margin > threshold
    right = (picked & (choice == label))[~unrelated]
    return Calibration(
        threshold=threshold,
        right=float(right.double().mean()) if len(right) else 0.0,
        false_picks=float(picked[unrelated].double().mean()) if bool(unrelated.any()) else 0.0,
    )
