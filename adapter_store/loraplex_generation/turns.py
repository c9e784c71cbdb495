"""What the base does with examples as turns of the chat: learning from them has to beat it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loraplex_generation.zoo.tasks import Example

from .frozen_base import FrozenBase
from .packing import ChatCodec, pack
from .refinement import HeldOut, folds, judging
from .scoring import score_groups

__all__ = ["score_turns"]


def score_turns(
    base: FrozenBase,
    codec: ChatCodec,
    description: str,
    pairs: Sequence[Example],
    *,
    n_tokens: int,
    look_up: Callable[[], None] = lambda: None,
) -> HeldOut:
    """The pairs that ``refine`` judges by, answered by the base with those outside their fold as
    turns before, as many as ``n_tokens`` hold, and ``description`` before the first.

    ``look_up`` is called before each fold; what it raises ends the work. ``base`` may raise
    TimeoutError.
    """
    rows = [codec.row(pair) for pair in pairs]
    parts = folds(len(pairs))
    nll = 0.0
    right: list[bool] = []
    for fold in parts:
        look_up()
        asked = [rows[i] for i in judging(rows, fold, n_tokens)]
        n_left = min(n_tokens, base.n_positions - max(len(row.tokens) for row in asked))
        shown = [pair for i, pair in enumerate(pairs) if i not in fold]
        turns = _turns(codec, description, shown, n_left - len(codec.head))
        (score,) = score_groups(base, pack((*codec.head, *turns), [asked]))
        nll += score.nll
        right += score.right
    return HeldOut(nll / len(parts), sum(right), len(right))


def _turns(
    codec: ChatCodec, description: str, shown: Sequence[Example], n_tokens: int
) -> tuple[int, ...]:
    """Of ``shown`` the first half, or of that half, and so on; at last none, nor a description."""
    asked = Example("", "")
    n_asked = len(codec.row(asked).tokens)
    while shown:
        turns = codec.row(asked, instruction=description, earlier=shown).tokens[:-n_asked]
        if len(turns) <= n_tokens:
            return turns
        shown = shown[: len(shown) // 2]
    return ()
