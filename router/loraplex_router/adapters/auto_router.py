"""``adapter: "auto"``: which registered adapter a request's text is for, or the base.

Adapters describe themselves by a description and example prompts. Unrelated everyday prompts
(``background.json``) stand for what no adapter is for. The index is refitted when adapters change;
only texts that are new are encoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Protocol

from torch import Tensor

from .classifier import Calibration, Features, TextClassifier
from .encoder import CachedEncoder, Encoder
from .lexical_features import lexical_features

__all__ = [
    "MAX_QUERY_CHARS",
    "AdapterFilter",
    "AdapterProfile",
    "AutoRouter",
    "Candidate",
    "Decision",
]

_MAX_TEXTS = 2000  # of all adapters: fitting is cubic in them
MAX_QUERY_CHARS = 2000  # of a text; the rest of it decides nothing
_N_CANDIDATES = 5
_MAX_INDEXES = 16  # of parts of the adapters


@dataclass(frozen=True, slots=True)
class AdapterProfile:
    """How an adapter presents itself. One without texts cannot be chosen."""

    name: str
    description: str | None = None
    examples: tuple[str, ...] = ()
    for_tools: bool = False  # a candidate of requests with tools, and of no others

    @property
    def texts(self) -> tuple[str, ...]:
        own = (self.description, *self.examples)
        return tuple(dict.fromkeys(t.strip() for t in own if t and t.strip()))


class AdapterFilter(Protocol):
    """A part of the adapters. Hashable; equal ones allow the same names."""

    def allows(self, name: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Candidate:
    name: str
    score: float  # about 1: certainly, about 0: not at all
    similarity: float  # cosine to the nearest of the adapter's texts


@dataclass(frozen=True, slots=True)
class Decision:
    """``adapter`` None: the base answers, since no margin passes the threshold."""

    adapter: str | None
    margin: float  # score of the best candidate − score of "none of them"
    threshold: float
    candidates: tuple[Candidate, ...]  # best first
    for_tools: bool = False  # only adapters for tools were candidates, and the best was taken

    def to_json(self, shown: Callable[[str], str] = str) -> dict[str, object]:
        """``shown``: name → what it is called in the answer."""
        return {
            "adapter": None if self.adapter is None else shown(self.adapter),
            "margin": round(self.margin, 4),
            "threshold": round(self.threshold, 4),
            "for_tools": self.for_tools,
            "candidates": [
                {
                    "name": shown(c.name),
                    "score": round(c.score, 4),
                    "similarity": round(c.similarity, 4),
                }
                for c in self.candidates
            ],
        }


@dataclass(frozen=True, slots=True)
class _Part:
    """Of the adapters: what an index is made of."""

    allowed: AdapterFilter | None = None
    for_tools: bool = False

    def has(self, profile: AdapterProfile) -> bool:
        if profile.for_tools != self.for_tools:
            return False
        return self.allowed is None or self.allowed.allows(profile.name)


_EVERYONE = _Part()


@dataclass(frozen=True, slots=True)
class _Fitted:
    profiles: tuple[AdapterProfile, ...]
    texts: Tensor  # float32 [n_texts, dim], of the adapters
    owner: tuple[int, ...]  # profile of each text
    classifier: TextClassifier


class AutoRouter:
    """Not thread-safe: one thread owns it, as it owns the encoder."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = CachedEncoder(encoder)
        self._background = _everyday_prompts()
        self._fitted: dict[_Part, _Fitted | None] = {}  # oldest first
        self._known: tuple[AdapterProfile, ...] = ()

    def update(self, profiles: Sequence[AdapterProfile]) -> bool:
        """Makes ``profiles`` the adapters to choose from; False if they are so already."""
        routable = tuple(sorted((p for p in profiles if p.texts), key=lambda p: p.name))
        if routable == self._known:
            return False
        self._known = routable
        self._fitted = {}
        self._index_of(_EVERYONE)
        return True

    def route(
        self,
        texts: Sequence[str],
        allowed: AdapterFilter | None = None,
        *,
        with_tools: bool = False,
    ) -> list[Decision]:
        """One decision for each text, as if there were no adapters but those of ``allowed``.

        ``with_tools``: the texts ask for calls of tools. If there are adapters for that, the best
        of them is chosen, however little the text says; else the texts are like any others.
        """
        fitted = self._index_of(_Part(allowed, for_tools=True)) if with_tools else None
        if fitted is None:
            fitted = self._index_of(_Part(allowed))
        if fitted is None:
            return [Decision(None, 0.0, 0.0, ()) for _ in texts]
        queries = self._features([text[:MAX_QUERY_CHARS] for text in texts])
        scores = fitted.classifier.scores(queries)
        similarity = queries.meaning @ fitted.texts.T
        return [_decide(fitted, row, near) for row, near in zip(scores, similarity, strict=True)]

    @property
    def calibration(self) -> Calibration | None:
        """None while there is no adapter to choose."""
        fitted = self._fitted.get(_EVERYONE)
        return None if fitted is None else fitted.classifier.calibration

    @property
    def n_encoded(self) -> int:
        return self._encoder.n_encoded

    def _index_of(self, part: _Part) -> _Fitted | None:
        """An index of its own for each part: the other adapters must not show in the scores."""
        if part not in self._fitted:
            if len(self._fitted) > _MAX_INDEXES:
                del self._fitted[next(key for key in self._fitted if key != _EVERYONE)]
            profiles = tuple(p for p in self._known if part.has(p))
            same = next((f for f in self._fitted.values() if f and f.profiles == profiles), None)
            self._fitted[part] = same or self._fit(profiles)
        return self._fitted[part]

    def _fit(self, profiles: tuple[AdapterProfile, ...]) -> _Fitted | None:
        if not profiles:
            return None
        each = max(1, _MAX_TEXTS // len(profiles))
        texts = [(i, text) for i, p in enumerate(profiles) for text in p.texts[:each]]
        own = {text for _, text in texts}
        unrelated = [text for text in self._background if text not in own]
        features = self._features([*(text for _, text in texts), *unrelated])
        labels = [*(i for i, _ in texts), *([len(profiles)] * len(unrelated))]
        return _Fitted(
            profiles=profiles,
            texts=features.meaning[: len(texts)],
            owner=tuple(i for i, _ in texts),
            classifier=TextClassifier(features, labels, len(profiles)),
        )

    def _features(self, texts: Sequence[str]) -> Features:
        return Features(self._encoder.encode(texts), lexical_features(texts))


def _decide(fitted: _Fitted, scores: Tensor, similarity: Tensor) -> Decision:
    *own, none = scores.tolist()
    nearest = [-1.0] * len(own)
    for owner, value in zip(fitted.owner, similarity.tolist(), strict=True):
        nearest[owner] = max(nearest[owner], value)
    ranked = sorted(range(len(own)), key=lambda i: (-own[i], fitted.profiles[i].name))
    candidates = tuple(
        Candidate(fitted.profiles[i].name, own[i], nearest[i]) for i in ranked[:_N_CANDIDATES]
    )
    margin = own[ranked[0]] - none
    threshold = fitted.classifier.calibration.threshold
    for_tools = fitted.profiles[0].for_tools
    chosen = candidates[0].name if for_tools or margin > threshold else None
    return Decision(chosen, margin, threshold, candidates, for_tools)


@cache
def _everyday_prompts() -> tuple[str, ...]:
    return tuple(json.loads(files(__package__).joinpath("background.json").read_text("utf-8")))
