"""From a description to what the content of its task is: a distribution over the trained ones.

A content is an operation in a language, if it has one. The reader is trained on phrasings alone;
what a content does to the base is not its business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .sentences import Encoded

__all__ = ["ContentReader", "ReaderRecipe", "ReaderShape", "train_content_reader"]

_TEMPERATURE = 0.7  # of the softmax: trained on smoothed labels, it is less sure than it may be


@dataclass(frozen=True, slots=True)
class ReaderShape:
    width: int  # of the sentence encoder
    n_contents: int
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


class ContentReader(nn.Module):
    """Token states of a description → logits over contents.

    Each query has its own attention over the tokens, so "the first three" is read where it stands.
    """

    def __init__(self, shape: ReaderShape) -> None:
        super().__init__()
        self.shape = shape
        self.queries = nn.Parameter(torch.randn(shape.n_queries, shape.width) / shape.width**0.5)
        pooled = (shape.n_queries + 1) * shape.width
        self.norm = nn.LayerNorm(pooled)
        self.inner = nn.Linear(pooled, shape.hidden)
        self.outer = nn.Linear(shape.hidden, shape.n_contents)

    def forward(self, encoded: Encoded) -> Tensor:
        """[n_texts, n_contents]."""
        pooled = encoded.attended(self.queries)
        read = self._dropped(self.norm(torch.cat([pooled.flatten(1), encoded.mean], 1)))
        logits: Tensor = self.outer(self._dropped(F.gelu(self.inner(read))))
        return logits

    def shares(self, encoded: Encoded) -> Tensor:
        """[n_texts, n_contents], each text's sum one."""
        shares: Tensor = (self(encoded) / _TEMPERATURE).softmax(-1)
        return shares

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training)


def train_content_reader(
    encoded: Encoded,
    contents: Tensor,
    n_contents: int,
    recipe: ReaderRecipe = ReaderRecipe(),
) -> ContentReader:
    """`contents` int64 [n_texts]. Minutes on one core; the same reader for the same seed."""
    torch.manual_seed(recipe.seed)
    reader = ContentReader(ReaderShape(encoded.tokens.shape[-1], n_contents)).train()
    optimiser = torch.optim.AdamW(reader.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    n = len(contents)
    for step in range(recipe.n_steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate * recipe.share(step)
        rows = torch.randint(n, (min(recipe.n_texts, n),))
        part = encoded.rows(rows)
        longest = int(part.mask.sum(1).max())
        tokens = part.tokens[:, :longest].float()
        noisy = tokens + recipe.noise * torch.randn_like(tokens)
        logits = reader(Encoded(noisy, part.mask[:, :longest], part.sentence))
        loss = F.cross_entropy(logits, contents[rows], label_smoothing=recipe.smoothing)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    return reader.eval().requires_grad_(False)
