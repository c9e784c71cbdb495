"""What the base does with examples as turns of the chat: learning from them has to beat it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from loraplex_generation.zoo.tasks import Example

from .frozen_base import FrozenBase
from .packing import ChatCodec, Row, pack
from .refinement import HeldOut
from .scoring import score_groups

__all__ = ["score_turns"]


def score_turns(
    base: FrozenBase,
    codec: ChatCodec,
    description: str,
    pairs: Sequence[Example],
    folds: Sequence[Collection[int]],
    *,
    n_tokens: int,
) -> HeldOut:
    """Each fold of ``pairs`` answered by the base, with the pairs outside it as turns before.

    ``description`` goes before the first of them. ``n_tokens`` bounds the turns of a fold, and what
    it is scored on: the first that fit, at least one. ``base`` may raise TimeoutError.
    """
    nll = 0.0
    right: list[bool] = []
    for fold in folds:
        shown = [pair for i, pair in enumerate(pairs) if i not in fold]
        asked = [pairs[i] for i in sorted(fold)]
        first = codec.row(asked[0], instruction=description, earlier=shown)
        while len(first.tokens) > n_tokens and len(shown) > 1:
            shown = shown[: len(shown) // 2]
            first = codec.row(asked[0], instruction=description, earlier=shown)
        alone = [codec.row(pair) for pair in asked]
        turns = first.tokens[: -len(alone[0].tokens)]
        rows = _first(alone, n_tokens)
        (score,) = score_groups(base, pack((*codec.head, *turns), [rows]))
        nll += score.nll
        right += score.right
    return HeldOut(nll / len(folds), sum(right), len(right))


def _first(rows: Sequence[Row], n_tokens: int) -> Sequence[Row]:
    n, left = 0, n_tokens
    for row in rows:
        left -= len(row.tokens)
        n += left >= 0
    return rows[: max(1, n)]
