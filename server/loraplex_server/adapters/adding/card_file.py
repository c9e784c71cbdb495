"""Reads card.json beside an adapter, as `loraplex train` writes it.

Long texts are cut: the operator who serves an adapter did not write its card.
"""

from dataclasses import replace
from typing import Annotated

import orjson
from pydantic import AfterValidator, BaseModel, JsonValue, ValidationError

from loraplex_adapter_store.files.json_size import check_depth
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_server.adapters.resolving.adapter_defaults import read_defaults
from loraplex_server.errors import ApiError, invalid

MAX_CARD_TEXT = 2000  # characters of a description or example
MAX_CARD_EXAMPLES = 100

_Text = Annotated[str, AfterValidator(lambda text: text[:MAX_CARD_TEXT])]


class CardFile(BaseModel):
    description: _Text | None = None
    examples: Annotated[
        tuple[_Text, ...], AfterValidator(lambda texts: texts[:MAX_CARD_EXAMPLES])
    ] = ()
    defaults: dict[str, JsonValue] = {}


def read_card_file(text: str | bytes, code: str = "bad_upload") -> CardFile:
    """Read a card.json. Raises ApiError (400), with ``code`` for a card of the wrong form."""
    try:
        check_depth(text)
        card = CardFile.model_validate(orjson.loads(text))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = f"{problem['loc'][0]}: " if problem["loc"] else ""
        raise invalid(f"card.json: {where}{problem['msg']}", "card", code) from error
    except ValueError as error:
        raise invalid(f"card.json is not JSON: {error}", "card", code) from error
    try:
        read_defaults(card.defaults)
    except ApiError as error:
        error.message = f"card.json: {error.message}"
        raise
    return card


def fill_from_card(text: bytes, options: PutOptions) -> PutOptions:
    """Fill missing ``options`` from the card.json of a source. Raises ApiError (400)."""
    card = read_card_file(text, "source_unreadable")
    return replace(
        options,
        description=card.description if options.description is None else options.description,
        examples=options.examples or card.examples,
        defaults=card.defaults if options.defaults is None else options.defaults,
    )
