"""``adapter: "auto"``: choose the registered adapter for a request's text, or the base.

Adapters have a description and example prompts. Everyday prompts (``background.json``) represent
texts for no adapter. An index is fitted when it is needed, and again once its adapters change; only
new texts are encoded.
"""

import itertools
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .classifier import Calibration, Features, TextClassifier
from .encoder import CachedEncoder, Encoder

_MAX_TEXTS = 2000  # of all adapters together: fitting is cubic in their number
MAX_QUERY_CHARS = 2000  # of a text; the rest is ignored
_N_CANDIDATES = 5
_MAX_INDEXES = 16  # for subsets of the adapters
N_LEXICAL_FEATURES = 2048
_TOKEN = re.compile(r"\d|[^\W\d_]+|[^\w\s]", re.UNICODE)


@dataclass(frozen=True, slots=True)
class AdapterProfile:
    """An adapter's description and examples. An adapter without texts cannot be chosen."""

    name: str
    description: str | None = None
    examples: tuple[str, ...] = ()
    for_tools: bool = False  # a candidate only for requests with tools

    @property
    def texts(self) -> tuple[str, ...]:
        own = (self.description, *self.examples)
        return tuple(dict.fromkeys(t.strip() for t in own if t and t.strip()))


class AdapterFilter(Protocol):
    """A subset of the adapters. Hashable; equal filters allow the same names."""

    def allows(self, name: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Candidate:
    name: str
    score: float  # about 1: certainly, about 0: not at all
    similarity: float  # cosine to the nearest of the adapter's texts


@dataclass(frozen=True, slots=True)
class Decision:
    """The choice for one text. ``adapter`` None: no margin passes the threshold; use the base."""

    adapter: str | None
    margin: float  # score of the best candidate − score of "none of them"
    threshold: float
    candidates: tuple[Candidate, ...]  # best first
    for_tools: bool = False  # the best of the adapters for tools was taken

    def to_json(self, shown: Callable[[str], str] = str) -> dict[str, object]:
        """Return the decision as JSON. ``shown`` maps stored names to names in the answer."""
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
    """The subset of the adapters that an index covers."""

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
    """Chooses adapters for texts. Not thread-safe: one thread owns the router and its encoder."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = CachedEncoder(encoder)
        self._background = _everyday_prompts()
        self._fitted: dict[_Part, _Fitted | None] = {}  # oldest first
        self._known: tuple[AdapterProfile, ...] = ()

    def update(self, profiles: Sequence[AdapterProfile]) -> bool:
        """Set the adapters to choose from. Return False if nothing has changed."""
        routable = tuple(sorted((p for p in profiles if p.texts), key=lambda p: p.name))
        if routable == self._known:
            return False
        self._known = routable
        kept = self._fitted.items()
        self._fitted = {part: old for part, old in kept if old and old.profiles == self._of(part)}
        return True

    def unread(
        self,
        texts: Sequence[str],
        allowed: AdapterFilter | None = None,
        *,
        with_tools: bool = False,
    ) -> list[str]:
        """Return the texts that ``route`` would encode, unless they are remembered before."""
        needed = [text[:MAX_QUERY_CHARS] for text in texts]
        for part in self._parts(allowed, with_tools=with_tools):
            if part not in self._fitted and (profiles := self._of(part)):
                owned, unrelated = self._texts(profiles)
                needed += [*(text for _, text in owned), *unrelated]
        return self._encoder.missing(needed)

    def remember(self, vectors: Mapping[str, Tensor]) -> None:
        """Add texts with the vectors that the encoder made of them."""
        self._encoder.remember(vectors)

    def route(
        self,
        texts: Sequence[str],
        allowed: AdapterFilter | None = None,
        *,
        with_tools: bool = False,
    ) -> list[Decision]:
        """Return one decision for each text. Adapters outside of ``allowed`` have no influence.

        ``with_tools``: the requests have tools. If there are adapters for tools, the best of them
        is chosen, whatever its margin.
        """
        indexes = map(self._index_of, self._parts(allowed, with_tools=with_tools))
        fitted = next(filter(None, indexes), None)
        if fitted is None:
            return [Decision(None, 0.0, 0.0, ()) for _ in texts]
        queries = self._features([text[:MAX_QUERY_CHARS] for text in texts])
        scores = fitted.classifier.scores(queries)
        similarity = queries.meaning @ fitted.texts.T
        return [_decide(fitted, row, near) for row, near in zip(scores, similarity, strict=True)]

    @property
    def calibration(self) -> Calibration | None:
        """The calibration over all adapters; None before a text was routed among all of them."""
        fitted = self._fitted.get(_EVERYONE)
        return None if fitted is None else fitted.classifier.calibration

    @staticmethod
    def _parts(allowed: AdapterFilter | None, *, with_tools: bool) -> list[_Part]:
        """Return the parts of which the first that has adapters decides."""
        return [*([_Part(allowed, for_tools=True)] if with_tools else []), _Part(allowed)]

    def _of(self, part: _Part) -> tuple[AdapterProfile, ...]:
        return tuple(p for p in self._known if part.has(p))

    def _index_of(self, part: _Part) -> _Fitted | None:
        """Return an index of these adapters alone, so that others do not influence the scores."""
        if part not in self._fitted:
            if len(self._fitted) > _MAX_INDEXES:
                del self._fitted[next(key for key in self._fitted if key != _EVERYONE)]
            profiles = self._of(part)
            same = next((f for f in self._fitted.values() if f and f.profiles == profiles), None)
            self._fitted[part] = same or self._fit(profiles)
        return self._fitted[part]

    def _fit(self, profiles: tuple[AdapterProfile, ...]) -> _Fitted | None:
        if not profiles:
            return None
        texts, unrelated = self._texts(profiles)
        features = self._features([*(text for _, text in texts), *unrelated])
        labels = [*(i for i, _ in texts), *([len(profiles)] * len(unrelated))]
        return _Fitted(
            profiles=profiles,
            texts=features.meaning[: len(texts)],
            owner=tuple(i for i, _ in texts),
            classifier=TextClassifier(features, labels, len(profiles)),
        )

    def _texts(
        self, profiles: tuple[AdapterProfile, ...]
    ) -> tuple[list[tuple[int, str]], list[str]]:
        """Return the texts of the adapters, with the index of each one's adapter, and of none."""
        each = max(1, _MAX_TEXTS // len(profiles))
        texts = [(i, text) for i, p in enumerate(profiles) for text in p.texts[:each]]
        own = {text for _, text in texts}
        return texts, [text for text in self._background if text not in own]

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


def lexical_features(texts: Sequence[str]) -> Tensor:
    """Return float32 [n_texts, N_LEXICAL_FEATURES], unit length: hashed words and word pairs.

    Digits count one by one, so numbers of equal length look alike.
    """
    counts = torch.zeros(len(texts), N_LEXICAL_FEATURES)
    for row, text in enumerate(texts):
        tokens = ["0" if t.isdigit() else t for t in _TOKEN.findall(text.lower())]
        pairs = [f"{a} {b}" for a, b in itertools.pairwise(tokens)]
        for token in (*tokens, *pairs):
            counts[row, zlib.crc32(token.encode()) % N_LEXICAL_FEATURES] += 1
    return normalize(torch.log1p(counts), dim=1)
