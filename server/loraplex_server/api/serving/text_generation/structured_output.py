"""Turns the structured-output fields of a body into the grammar of the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import orjson
from llguidance import LLMatcher
from pydantic import JsonValue

from loraplex_adapter_store.files.json_size import check_depth
from loraplex_server.api.protocol.generation import (
    GenerationBody,
    ResponseFormat,
    StructuredOutputs,
)
from loraplex_server.api.serving.unsupported import refuse_parts
from loraplex_server.engine.requests.grammar import GrammarSpec
from loraplex_server.errors import invalid

from .grammars import check_length
from .json_schema import enforceable

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

T = TypeVar("T")
# The whitespace of json.dumps. With free whitespace, small models write endless blanks.
JSON_STYLE: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
_HINTS = ("disable_fallback", "disable_any_whitespace", "backend")  # of vLLM
_ANY_OBJECT: JsonValue = {"type": "object"}


class RequestedGrammar(NamedTuple):
    """A grammar and the field of the body that requests it."""

    param: str
    spec: GrammarSpec


def requested_grammar(body: GenerationBody) -> RequestedGrammar | None:
    """Return the grammar of the body; None: any text. Raises ApiError (400), also for two."""
    grammars = [
        *_json("guided_json", body.guided_json),
        *_json("json_schema", body.json_schema),
        *_of("guided_regex", body.guided_regex, LLMatcher.grammar_from_regex),
        *_of("regex", body.regex or None, LLMatcher.grammar_from_regex),
        *_of("guided_choice", body.guided_choice, _choice),
        *_grammar("guided_grammar", body.guided_grammar),
        *_grammar("ebnf", body.ebnf or None),
        *_grammar("grammar", body.grammar or None),
        *_response_format(body.response_format),
        *_structured_outputs(body.structured_outputs),
    ]
    if len(grammars) > 1:
        first, second = grammars[0].param, grammars[1].param
        raise invalid(f"{first} and {second} exclude each other; give one", second)
    return grammars[0] if grammars else None


def requested_json(param: str, schema: JsonValue, *, lenient: bool = False) -> RequestedGrammar:
    """Return the grammar of JSON with this schema. Raises ApiError (400)."""
    return _json(param, schema, lenient=lenient)[0]


def json_grammar(schema: object, lenient: bool = False) -> str:
    """Return the grammar of all JSON values that ``schema`` allows, written as by json.dumps.

    ``lenient`` ignores keywords that the compiler cannot enforce, instead of refusing them.
    """
    options: JsonCompileOptions = {**JSON_STYLE, "lenient": lenient}
    text = orjson.dumps(enforceable(schema, lenient=lenient)).decode()
    return LLMatcher.grammar_from_json_schema(text, overrides=options)


def enforced(schema: JsonValue, param: str) -> object:
    """Return the schema as llguidance enforces it. Raises ApiError (400)."""
    try:
        return enforceable(schema)
    except ValueError as error:
        raise invalid(f"{param} cannot be followed: {error}", param, "invalid_grammar") from error


def _response_format(requested: ResponseFormat | None) -> list[RequestedGrammar]:
    if requested is None or requested.type == "text":
        return []
    refuse_parts(requested, "response_format")
    named = requested.json_schema
    if named is not None and requested.type == "json_schema":
        refuse_parts(named, "response_format.json_schema")
        schema = {} if named.schema_ is None else named.schema_
        param, lenient = "response_format.json_schema.schema", named.strict is False
        return _json(param, schema, lenient=lenient)
    beside: list[tuple[str, JsonValue]] = [
        ("response_format.schema", requested.schema_),
        ("response_format.value", requested.value),
    ]
    given = [(param, value) for param, value in beside if value is not None]
    if len(given) > 1:
        raise invalid("response_format has both schema and value; give one", given[1][0])
    if requested.type in ("json_schema", "regex") and not given:
        needed = "json_schema" if requested.type == "json_schema" else "value"
        raise invalid(
            f"a response_format of type {requested.type!r} needs {needed}",
            f"response_format.{needed}",
        )
    param, value = given[0] if given else ("response_format", _ANY_OBJECT)
    if requested.type != "regex":
        return _json(param, value)
    if not isinstance(value, str):
        raise invalid("response_format.value must be the text of a regular expression", param)
    return _of(param, value, LLMatcher.grammar_from_regex)


def _structured_outputs(requested: StructuredOutputs | None) -> list[RequestedGrammar]:
    if requested is None:
        return []
    refuse_parts(requested, "structured_outputs", without_effect=_HINTS)
    any_object = _ANY_OBJECT if requested.json_object else None
    grammars = [
        *_json("structured_outputs.json", requested.json_),
        *_of("structured_outputs.regex", requested.regex, LLMatcher.grammar_from_regex),
        *_of("structured_outputs.choice", requested.choice, _choice),
        *_grammar("structured_outputs.grammar", requested.grammar),
        *_json("structured_outputs.json_object", any_object),
    ]
    if not grammars:
        raise invalid(
            "structured_outputs needs json, regex, choice, grammar or json_object",
            "structured_outputs",
        )
    return grammars


def _json(param: str, schema: JsonValue, *, lenient: bool = False) -> list[RequestedGrammar]:
    """Return the grammar of a schema, which may be JSON text; none for None."""

    def grammar(value: object) -> str:
        if isinstance(value, str):
            check_length(value, param)
            check_depth(value)
            value = orjson.loads(value)
        return json_grammar(value, lenient)

    return _of(param, schema, grammar)


def _grammar(param: str, text: str | None) -> list[RequestedGrammar]:
    return [] if text is None else [RequestedGrammar(param, GrammarSpec(text, may_be_gbnf=True))]


def _of(param: str, value: T | None, grammar: Callable[[T], str]) -> list[RequestedGrammar]:
    """Return no grammar for None. Raises ApiError (400) for a value that makes no grammar."""
    if value is None:
        return []
    try:
        return [RequestedGrammar(param, GrammarSpec(grammar(value)))]
    except ValueError as error:
        reason = str(error).split("\n")[0][:300]
        raise invalid(f"{param} cannot be followed: {reason}", param, "invalid_grammar") from error


def _choice(texts: list[str]) -> str:
    # The texts are alternatives of one terminal: as rules, two thousand of them would be too many
    # for a step of the parser.
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(t, ensure_ascii=False) for t in texts)
