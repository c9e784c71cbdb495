"""card.json beside an adapter, as `loraplex train` writes it: checked alike wherever it is from.

Its texts are cut to the limits: whoever serves an adapter did not write its card.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice

import orjson
from pydantic import JsonValue

from loraplex_adapter_store.put_options import PutOptions
from loraplex_server.api.errors import invalid

from .adapter_defaults import DefaultsRefused, read_defaults

__all__ = [
    "MAX_CARD_EXAMPLES",
    "MAX_CARD_TEXT",
    "CardFile",
    "cut_description",
    "cut_examples",
    "told_by_card",
]

MAX_CARD_TEXT = 2000  # characters of a description or example
MAX_CARD_EXAMPLES = 100


class CardFile:
    """Raises ApiError (400) for what is malformed, once that is asked for."""

    def __init__(self, text: str | bytes | None, code: str = "bad_upload") -> None:
        """``text``: None says nothing. ``code``: of the errors."""
        self._code = code
        self._card: dict[str, JsonValue] = {}
        if text is None:
            return
        try:
            card = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise invalid(f"card.json is not JSON: {error}", "card", code) from error
        if not isinstance(card, dict):
            raise invalid("card.json must be a JSON object", "card", code)
        self._card = card

    @property
    def description(self) -> str | None:
        description = self._card.get("description")
        if not isinstance(description, str | None):
            raise invalid("the description of card.json must be a text", "card", self._code)
        return cut_description(description)

    @property
    def examples(self) -> tuple[str, ...]:
        examples = self._card.get("examples", [])
        texts = examples if isinstance(examples, list) else [None]
        found = tuple(text for text in texts if isinstance(text, str))
        if len(found) < len(texts):
            raise invalid("the examples of card.json must be a list of texts", "card", self._code)
        return cut_examples(found)

    @property
    def defaults(self) -> Mapping[str, JsonValue]:
        defaults = self._card.get("defaults", {})
        if not isinstance(defaults, dict):
            raise invalid("the defaults of card.json must be an object", "card", self._code)
        try:
            read_defaults(defaults)
        except DefaultsRefused as error:
            raise invalid(f"card.json: {error}", error.param) from error
        return defaults


def cut_description(description: str | None) -> str | None:
    return description and description[:MAX_CARD_TEXT]


def cut_examples(examples: Iterable[str]) -> tuple[str, ...]:
    return tuple(text[:MAX_CARD_TEXT] for text in islice(examples, MAX_CARD_EXAMPLES))


def told_by_card(text: bytes, options: PutOptions) -> PutOptions:
    """``options`` of a put from a source: what they do not say, its card.json says.

    Raises ApiError (400) for a card that is wrong, also where the options say it all.
    """
    card = CardFile(text, "source_unreadable")
    description, examples, defaults = card.description, card.examples, card.defaults
    return replace(
        options,
        description=description if options.description is None else options.description,
        examples=options.examples or examples,
        defaults=defaults if options.defaults is None else options.defaults,
    )
