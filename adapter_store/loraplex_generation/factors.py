"""From a description to the factors of its task: operation, language, format.

Each factor has its own attention over the token states of the description, so that "in German" and
"as JSON" are read where they stand. The result is a point `c` that adapters are linear in:

    c = [1, p(operation), p(language), p(format), p(operation) p(language) for the trained pairs]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from loraplex_generation.zoo.tasks import Task

from .sentences import Encoded

__all__ = ["FactorHead", "Factors", "train_factor_head", "without_tail"]

_NONE = ""  # the language of operations that have none
_SMOOTHING = 0.05


@dataclass(frozen=True, slots=True)
class Factors:
    """The levels that the training tasks know, in a fixed order."""

    operations: tuple[str, ...]
    languages: tuple[str, ...]  # the first is "none"
    formats: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]  # (operation, language) seen together

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> Factors:
        def unique(values: list[str]) -> tuple[str, ...]:
            return tuple(dict.fromkeys(values))

        languages = unique([t.language for t in tasks if t.language])
        return cls(
            operations=unique([t.operation for t in tasks]),
            languages=(_NONE, *languages),
            formats=unique([t.format for t in tasks]),
            pairs=tuple(dict.fromkeys((t.operation, t.language) for t in tasks if t.language)),
        )

    @property
    def groups(self) -> tuple[int, int, int]:
        return len(self.operations), len(self.languages), len(self.formats)

    @property
    def size(self) -> int:
        """Length of `c`: the constant, operations, real languages, formats, pairs."""
        n_op, n_lang, n_fmt = self.groups
        return 1 + n_op + (n_lang - 1) + n_fmt + len(self.pairs)

    @property
    def names(self) -> list[str]:
        """What each coordinate of `c` stands for."""
        pairs = [f"{op}×{language}" for op, language in self.pairs]
        return ["mean", *self.operations, *self.languages[1:], *self.formats, *pairs]

    def labels(self, task: Task) -> tuple[int, int, int]:
        return (
            self.operations.index(task.operation),
            self.languages.index(task.language),
            self.formats.index(task.format),
        )

    def point(self, operation: Tensor, language: Tensor, dressing: Tensor) -> Tensor:
        """`c` [n, size] from the three distributions [n, levels]."""
        pairs = [
            operation[:, self.operations.index(op)] * language[:, self.languages.index(lang)]
            for op, lang in self.pairs
        ]
        ones = torch.ones_like(operation[:, :1])
        parts = [ones, operation, language[:, 1:], dressing]
        return torch.cat([*parts, *[pair[:, None] for pair in pairs]], 1)

    def exact_point(self, task: Task) -> Tensor:
        """`c` [size] of a task whose levels are all known."""
        hot = [
            F.one_hot(torch.tensor([label]), n).float()
            for label, n in zip(self.labels(task), self.groups, strict=True)
        ]
        return self.point(*hot)[0]


class FactorHead(nn.Module):
    """Token states → one distribution per factor."""

    def __init__(self, width: int, groups: Sequence[int]) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(groups), width) / width**0.5)
        self.classify = nn.ModuleList(nn.Linear(2 * width, n) for n in groups)

    def forward(self, encoded: Encoded) -> list[Tensor]:
        """Logits, a tensor [n_texts, levels] per factor."""
        pooled, mean = encoded.attended(self.queries), encoded.mean
        return [
            head(F.dropout(torch.cat([pooled[:, i], mean], -1), 0.3, self.training))
            for i, head in enumerate(self.classify)
        ]

    def distributions(self, encoded: Encoded) -> list[Tensor]:
        """One distribution per factor, without the levels that the text all but rules out."""
        return [without_tail(logits.softmax(-1)) for logits in self(encoded)]


def without_tail(p: Tensor) -> Tensor:
    """Probabilities under a tenth of the largest are noise, and noise times an adapter adds up."""
    kept = torch.where(p < p.amax(-1, keepdim=True) / 10, 0.0, p)
    return kept / kept.sum(-1, keepdim=True)


def train_factor_head(
    encoded: Encoded, labels: Tensor, groups: Sequence[int], *, seed: int = 0, n_steps: int = 400
) -> FactorHead:
    """`labels` int64 [n_texts, n_factors], −1 where a text says nothing of a factor.

    Seconds on one core; the same head for the same seed.
    """
    torch.manual_seed(seed)
    head = FactorHead(encoded.tokens.shape[-1], groups)
    optimiser = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.05)
    n = len(labels)
    for step in range(n_steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - step / n_steps)
        rows = torch.randint(n, (min(128, n),))
        part = encoded.rows(rows)
        tokens = part.tokens.float()
        noisy = part._replace(tokens=tokens + 0.1 * torch.randn_like(tokens))
        loss = sum(
            F.cross_entropy(logits, labels[rows, i], ignore_index=-1, label_smoothing=_SMOOTHING)
            for i, logits in enumerate(head(noisy))
        )
        optimiser.zero_grad()
        assert isinstance(loss, Tensor)
        torch.autograd.backward(loss)
        optimiser.step()
    return head.eval().requires_grad_(False)
