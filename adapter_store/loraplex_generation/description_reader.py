"""What a description asks for, in the terms of a text map, and how sure that is.

    score = 1 − max over contents of cos(W x, W m_c) − Σ over contents of share_c · ln(share_c) / 4

The first half is the guard's (`guard.py`): what the sentence is about. The second is the content
reader's doubt, the entropy of its shares: a sentence that is about the right things may still ask
for what nobody has trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_generation.zoo.phrasings import Phrasing, paraphrases, phrasings

from .dressings import Dressings
from .factors import without_tail
from .guard import OodDetector
from .label_reader import LabelReader, ReaderRecipe, ReaderShape, train_label_reader
from .sentences import Encoded, SentenceEncoder

__all__ = ["DescriptionReader", "Reading", "train_description_reader"]

_PER_PHRASE = 2  # phrasings
_ACCEPTED = 0.88  # share of held-out phrasings; chosen on validation tasks
_TEXTS_AT_ONCE = 2048  # encoded: their token states are wide before they are halved


class Reading(NamedTuple):
    dressing: Tensor  # float32 [len(dressings.names)]: of languages and formats, shares
    shares: Tensor  # float32 [n_contents], their sum one


@dataclass(frozen=True, slots=True)
class DescriptionReader:
    """Immutable. A content is an operation in a language, if it has one."""

    dressings: Dressings
    contents: tuple[str, ...]
    language: LabelReader  # none comes first
    format: LabelReader
    content: LabelReader
    guard: OodDetector  # its classes are the contents; without a limit of its own
    limit: float  # of `scores`

    @torch.inference_mode()
    def read(self, encoded: Encoded) -> Reading:
        """The mean over the texts."""
        asked = [without_tail(part.shares(encoded)) for part in (self.language, self.format)]
        return Reading(self.dressings.point(*asked).mean(0), self.content.shares(encoded).mean(0))

    @torch.inference_mode()
    def scores(self, encoded: Encoded) -> Tensor:
        """[n_texts], from 0 up. Above the limit, a description is refused."""
        doubt: Tensor = torch.special.entr(self.content.shares(encoded)).sum(-1)
        return self.guard.score(encoded.sentence) + doubt / 4


def train_description_reader(
    encoder: SentenceEncoder,
    dressings: Dressings,
    contents: Sequence[str],
    recipe: ReaderRecipe = ReaderRecipe(),  # noqa: B008  frozen value
) -> DescriptionReader:
    """A quarter of an hour on two cores for hundreds of contents, and 5 GB.

    `recipe` is the content's; language and format take fewer steps, less noise and smoothing.

    The limit accepts most phrasings of every fifth paraphrase, scored by a reader and a guard that
    were trained without these, before a file rounds them.
    """
    made = phrasings(contents, dressings.formats, _PER_PHRASE)
    encoded = _encoded(encoder, [phrasing.text for phrasing in made])
    languages = [content.partition(".")[2] for content in contents]
    width = encoded.tokens.shape[-1]
    labels = torch.tensor([dressings.labels(languages[p.content], p.dressing) for p in made])
    of_language, of_format = (
        train_label_reader(
            encoded,
            labels[:, i],
            ReaderShape(width, n, n_queries=4, hidden=192),
            replace(recipe, n_steps=recipe.n_steps * 5 // 8, noise=0.1, smoothing=0.05),
        )
        for i, n in enumerate(dressings.groups)
    )

    def trained(seen: Tensor) -> DescriptionReader:
        part = encoded.rows(seen)
        owner = torch.tensor([made[i].content for i in seen.tolist()])
        return DescriptionReader(
            dressings=dressings,
            contents=tuple(contents),
            language=of_language,
            format=of_format,
            content=train_label_reader(part, owner, ReaderShape(width, len(contents)), recipe),
            guard=OodDetector.without_limit(part.sentence, [contents[i] for i in owner.tolist()]),
            limit=math.inf,
        )

    held_out = _every_fifth_paraphrase(made, contents)
    asked = encoded.rows(held_out.nonzero()[:, 0])
    scores = trained((~held_out).nonzero()[:, 0]).scores(
        asked._replace(tokens=asked.tokens.float())
    )
    limit = float(torch.quantile(scores, _ACCEPTED))
    return replace(trained(torch.arange(len(made))), limit=limit)


def _every_fifth_paraphrase(made: Sequence[Phrasing], contents: Sequence[str]) -> Tensor:
    """bool [n]: which of the phrasings are of one."""
    at = {
        (i, phrase): nth
        for i, content in enumerate(contents)
        for nth, phrase in enumerate(paraphrases(content.partition(".")[0]))
    }
    return torch.tensor([at.get((p.content, p.phrases[0]), 1) % 5 == 0 for p in made])


def _encoded(encoder: SentenceEncoder, texts: Sequence[str]) -> Encoded:
    """The token states in float16."""
    parts = [
        encoder.encode(texts[at : at + _TEXTS_AT_ONCE])
        for at in range(0, len(texts), _TEXTS_AT_ONCE)
    ]
    return Encoded.joined([part._replace(tokens=part.tokens.half()) for part in parts])
