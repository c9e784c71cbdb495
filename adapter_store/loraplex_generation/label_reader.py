"""From a description to a label of its task: a distribution over contents, languages or formats.

A content is an operation in a language, if it has one. A reader is trained on phrasings alone; what
its labels do to the base is not its business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .sentences import Encoded

__all__ = ["LabelReader", "ReaderRecipe", "ReaderShape", "train_label_reader"]

_TEMPERATURE = 0.7  # of the softmax: trained on smoothed labels, it is less sure than it may be


@dataclass(frozen=True, slots=True)
class ReaderShape:
    width: int  # of the sentence encoder
    n_labels: int
    n_queries: int = 6
    hidden: int = 384


@dataclass(frozen=True, slots=True)
class ReaderRecipe:
    n_steps: int = 4000
    n_texts: int = 128  # of a step
    rate: float = 2e-3
    warmup: int = 50
    decay: float = 0.1  # of the weights
    noise: float = 0.2  # added to token states
    smoothing: float = 0.1  # of the labels
    seed: int = 0

    def share(self, step: int) -> float:
        """Of the rate, at a step."""
        return min(1.0, (step + 1) / self.warmup) * (1 - step / self.n_steps)


class LabelReader(nn.Module):
    """Token states of a description → logits over labels.

    Each query has its own attention over the tokens, so "the first three" is read where it stands.
    """

    def __init__(self, shape: ReaderShape) -> None:
        super().__init__()
        self.shape = shape
        self.queries = nn.Parameter(torch.randn(shape.n_queries, shape.width) / shape.width**0.5)
        pooled = (shape.n_queries + 1) * shape.width
        self.norm = nn.LayerNorm(pooled)
        self.inner = nn.Linear(pooled, shape.hidden)
        self.outer = nn.Linear(shape.hidden, shape.n_labels)

    def forward(self, encoded: Encoded) -> Tensor:
        """[n_texts, n_labels]."""
        pooled = encoded.attended(self.queries)
        read = self._dropped(self.norm(torch.cat([pooled.flatten(1), encoded.mean], 1)))
        logits: Tensor = self.outer(self._dropped(F.gelu(self.inner(read))))
        return logits

    def shares(self, encoded: Encoded) -> Tensor:
        """[n_texts, n_labels], each text's sum one."""
        shares: Tensor = (self(encoded) / _TEMPERATURE).softmax(-1)
        return shares

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training)


def train_label_reader(
    encoded: Encoded,
    labels: Tensor,
    shape: ReaderShape,
    recipe: ReaderRecipe = ReaderRecipe(),
) -> LabelReader:
    """`labels` int64 [n_texts]. Minutes on one core; the same reader for the same seed."""
    torch.manual_seed(recipe.seed)
    reader = LabelReader(shape).train()
    optimiser = torch.optim.AdamW(reader.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    n = len(labels)
    for step in range(recipe.n_steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate * recipe.share(step)
        rows = torch.randint(n, (min(recipe.n_texts, n),))
        part = encoded.rows(rows)
        longest = int(part.mask.sum(1).max())
        tokens = part.tokens[:, :longest].float()
        noisy = tokens + recipe.noise * torch.randn_like(tokens)
        logits = reader(Encoded(noisy, part.mask[:, :longest], part.sentence))
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=recipe.smoothing)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    return reader.eval().requires_grad_(False)
