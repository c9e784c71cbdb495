"""What the base does with examples as turns of the chat: learning from them has to beat it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from loraplex_generation.zoo.tasks import Example

from .frozen_base import FrozenBase
from .judged_pairs import HeldOut, folds, judging
from .packing import ChatCodec, pack
from .scoring import score_groups

__all__ = ["beats_turns", "score_turns"]


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


def beats_turns(refinement: Mapping[str, object]) -> bool:
    """Whether what came of learning does better than the base with the examples as turns.

    ``refinement``: of the card. By the held-out pairs: which part of them is right, then their
    likelihood. That of an earlier version, which did not judge turns, beats them if
    anything was gained.
    """
    gained = refinement.get("gained") is True
    after, turns = (_held_out(refinement, of) for of in ("after", "turns"))
    if after is None or turns is None:
        return gained
    return after >= turns


def _held_out(refinement: Mapping[str, object], of: str) -> tuple[float, float] | None:
    """The larger the better."""
    held_out = refinement.get("held_out")
    match held_out.get(of) if isinstance(held_out, Mapping) else None:
        case {"exact": int(n_right), "of": int(n), "nll": int(nll) | float(nll)}:
            return n_right / max(n, 1), -nll
    return None


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
