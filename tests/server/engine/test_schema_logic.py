"""Logic of JSON schemas as grammars: each value is accepted exactly if another validator does."""

import itertools
import json
import random
from typing import Any

import jsonschema_rs
import pytest

from loraplex_server.engine.requests.grammar import GrammarRefused
from tests.server.engine.test_grammar import TRIE, accepts, compiled, split
from tests.support.grammar_walk import walk

_PAIRS = [[dict(zip(keys, values, strict=True))
           for values in itertools.product([1, "x"], repeat=len(keys))]
          for size in range(4) for keys in itertools.combinations("abc", size)]  # fmt: skip
VALUES: list[Any] = [
    *itertools.chain(*_PAIRS),
    *(1, 2, 3, 2.5, -7, "", "x", "xy", "a", "xyz", '"', "]", None, True, False),
    *([], [1], [1, 2], [2, 1], [1, 1], [True], [True, False], [False, True], [True, True]),
]
HAS_A, HAS_B = {"required": ["a"]}, {"required": ["b"]}
A_IS_X = {"properties": {"a": {"const": "x"}}, "required": ["a"]}
NAMED = {"properties": {"a": {}, "b": {}}, "additionalProperties": False}
SCHEMAS: list[dict[str, Any]] = [
    {"not": HAS_A},
    {"type": "object", "not": {"required": ["a", "b"]}},
    {"type": "object", **NAMED, "not": A_IS_X},
    {"type": "object", **NAMED, "not": {"required": ["c"]}},
    {"not": {"anyOf": [HAS_A, HAS_B]}},
    {"not": {"allOf": [{"type": "object"}, HAS_A]}},
    {"not": A_IS_X},
    {"not": {"not": HAS_A}},
    {"not": {"type": ["string", "null"]}},
    {"not": {"enum": ["x", 1, None]}},
    {"type": "string", "not": {"enum": ["x", "xy", "]", ""]}},
    {"type": "string", "not": {"const": "x"}, "maxLength": 2},
    {"type": "integer", "not": {"enum": [1, 3]}},
    {"not": {"const": True}},
    *({"not": {name: 1}} for name in ("minimum", "maximum", "exclusiveMinimum", "maxItems")),
    *({"not": {name: 1}} for name in ("exclusiveMaximum", "minLength", "maxLength", "minItems")),
    {"not": {"$ref": "#/$defs/has"}, "$defs": {"has": HAS_A}},
    {"$ref": "#/$defs/has", "not": HAS_B, "$defs": {"has": HAS_A}, "type": "object"},
    {"type": "object", "properties": {"a": {"not": {"const": "x"}}}},
    {"allOf": [{"not": HAS_A}, {"not": {"const": "x"}}]},
    {"dependentRequired": {"a": ["b", "c"], "b": ["a"]}},
    {"dependencies": {"a": ["b"], "b": {"properties": {"b": {"type": "string"}}}}},
    {"dependentSchemas": {"a": {"required": ["c"], "properties": {"c": {"type": "string"}}}}},
    {"type": "object", **NAMED, "dependentRequired": {"a": ["b"]}},
    {"if": HAS_A, "then": HAS_B, "else": {"required": ["c"]}},
    {"type": "object", "if": A_IS_X, "then": HAS_B},
    {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True},
    {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 1},
    {"type": "array", "items": {"$ref": "#/$defs/one"}, "uniqueItems": True,
     "$defs": {"one": {"enum": [True, 1, 1.0]}}},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_values_are_accepted_exactly_if_the_schema_allows_them(schema: dict[str, Any]) -> None:
    """The order of an object's properties does not count."""
    grammar = compiled(schema)
    for value in VALUES:
        orders = itertools.permutations(value.items()) if isinstance(value, dict) else ()
        texts = [json.dumps(dict(order)) for order in orders] or [json.dumps(value)]
        accepted = any(accepts(grammar, split(text, random.Random(0))) for text in texts)
        assert accepted == jsonschema_rs.is_valid(schema, value), value


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_what_a_random_model_writes_is_valid(schema: dict[str, Any]) -> None:
    grammar = compiled(schema)
    for seed in range(5):
        text = TRIE.tokenizer.decode_bytes(walk(TRIE, grammar, seed)).decode()
        assert jsonschema_rs.is_valid(schema, json.loads(text)), text


def _nested(keyword: str, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"if": HAS_A, "then": schema} if keyword == "then" else {keyword: schema}
    return schema


_DOUBLING = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 3} for n in range(30)}


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {"pattern": "a"}},
        {"not": {}},
        {"not": {"$ref": "#"}},
        {"not": 5},
        {"not": {"required": 5}},
        {"not": {"$ref": "#/$defs/d0"}, "$defs": {**_DOUBLING, "d30": {"const": 1}}},
        {"not": {"anyOf": [{"const": number} for number in range(5000)]}},
        {"dependencies": [1]},
        {"dependentRequired": {f"a{n}": ["b"] for n in range(5000)}},
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        {"type": "array", "items": {"enum": list("abcdefgh")}, "uniqueItems": True},
        _nested("not", 90),
        _nested("then", 90),
    ],
    ids=lambda schema: json.dumps(schema)[:40],
)
def test_what_has_no_small_equal_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises((GrammarRefused, ValueError)):
        compiled(schema)
