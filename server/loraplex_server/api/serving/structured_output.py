"""From the fields of a body to the grammar that the answer follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import orjson
from llguidance import LLMatcher
from pydantic import JsonValue

from loraplex_server.api.errors import invalid
from loraplex_server.api.protocol.generation import GenerationBody
from loraplex_server.api.protocol.structured_output import ResponseFormat, StructuredOutputs
from loraplex_server.engine.grammar import GrammarSpec

from .grammars import check_length

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

__all__ = ["Wanted", "json_grammar", "json_wanted", "wanted_grammar"]

T = TypeVar("T")
# As json.dumps writes. Free whitespace lets small models write blanks without end.
_AS_DUMPED: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
_ANY_OBJECT: JsonValue = {"type": "object"}


class Wanted(NamedTuple):
    """A grammar and the field of the body that asks for it."""

    param: str
    spec: GrammarSpec


def wanted_grammar(body: GenerationBody) -> Wanted | None:
    """None: any text. Raises ApiError (400), for two that are asked for at once, too."""
    found = [
        *_json("guided_json", body.guided_json),
        *_of("guided_regex", body.guided_regex, LLMatcher.grammar_from_regex),
        *_of("guided_choice", body.guided_choice, _choice),
        *_grammar("guided_grammar", body.guided_grammar),
        *_response_format(body.response_format),
        *_structured_outputs(body.structured_outputs),
    ]
    if len(found) > 1:
        raise invalid(
            f"{found[0].param} and {found[1].param} exclude each other; give one", found[1].param
        )
    return found[0] if found else None


def json_wanted(param: str, schema: JsonValue, *, lenient: bool = False) -> Wanted:
    """JSON of this schema. Raises ApiError (400)."""
    return _json(param, schema, lenient=lenient)[0]


def json_grammar(schema: object, lenient: bool = False) -> str:
    """Any JSON value that ``schema`` allows, written as json.dumps does.

    ``lenient``: keywords that cannot be enforced are left out, otherwise the compiler refuses them.
    """
    options: JsonCompileOptions = {**_AS_DUMPED, "lenient": lenient}
    return LLMatcher.grammar_from_json_schema(orjson.dumps(schema).decode(), overrides=options)


def _response_format(wanted: ResponseFormat | None) -> list[Wanted]:
    if wanted is None or wanted.type == "text":
        return []
    if wanted.type == "json_object":
        return _json("response_format", _ANY_OBJECT)
    named = wanted.json_schema
    if named is None:
        raise invalid(
            "a response_format of type 'json_schema' needs json_schema",
            "response_format.json_schema",
        )
    schema = {} if named.schema_ is None else named.schema_
    return _json("response_format.json_schema.schema", schema, lenient=named.strict is False)


def _structured_outputs(wanted: StructuredOutputs | None) -> list[Wanted]:
    if wanted is None:
        return []
    found = [
        *_json("structured_outputs.json", wanted.json_),
        *_of("structured_outputs.regex", wanted.regex, LLMatcher.grammar_from_regex),
        *_of("structured_outputs.choice", wanted.choice, _choice),
        *_grammar("structured_outputs.grammar", wanted.grammar),
        *_json("structured_outputs.json_object", _ANY_OBJECT if wanted.json_object else None),
    ]
    if not found:
        raise invalid(
            "structured_outputs needs json, regex, choice, grammar or json_object",
            "structured_outputs",
        )
    return found


def _json(param: str, schema: JsonValue, *, lenient: bool = False) -> list[Wanted]:
    """``schema``: one, the text of one, or None."""

    def grammar(given: object) -> str:
        if isinstance(given, str):
            check_length(given, param)
            given = orjson.loads(given)
        return json_grammar(given, lenient)

    return _of(param, schema, grammar)


def _grammar(param: str, text: str | None) -> list[Wanted]:
    return [] if text is None else [Wanted(param, GrammarSpec(text, may_be_gbnf=True))]


def _of(param: str, value: T | None, grammar: Callable[[T], str]) -> list[Wanted]:
    """Nothing if nothing is asked for. Raises ApiError for what is no grammar at first sight."""
    if value is None:
        return []
    try:
        return [Wanted(param, GrammarSpec(grammar(value)))]
    except (ValueError, RecursionError) as error:
        reason = str(error).split("\n")[0][:300]
        raise invalid(f"{param} cannot be followed: {reason}", param, "invalid_grammar") from error


def _choice(texts: list[str]) -> str:
    # One terminal: as rules, two thousand of them would be too many for a step.
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(t, ensure_ascii=False) for t in texts)
