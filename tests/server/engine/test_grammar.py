"""Grammars without a model: each walk under the mask is valid, each valid value is accepted."""

import json
import random
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis_jsonschema import from_schema

from loraplex_server.api.serving.text_generation.structured_output import json_grammar
from loraplex_server.engine.requests.grammar import (
    CompiledGrammar,
    GrammarRefused,
    GrammarSpec,
    TokenTrie,
)
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.support.grammar_walk import walk

EOS = 2
BACKEND = tiny_tokenizer().backend_tokenizer
TRIE = TokenTrie(BACKEND.to_str(), len(tiny_tokenizer()), {EOS})
SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer", "minimum": -5, "maximum": 1234},
    {"type": "number", "minimum": 0, "exclusiveMaximum": 10},
    {"enum": ["a", 1, None, {"b": [True]}]},
    {"type": "string", "minLength": 2, "maxLength": 6},
    {"type": "string", "pattern": "^[a-z]{2,4}-[0-9]+x$"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    {"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}], "items": False},
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/flag"}},
        "required": ["b"],
        "additionalProperties": False,
        "$defs": {"flag": {"type": "boolean"}},
    },
    {"anyOf": [{"type": "null"}, {"type": "object", "properties": {}, "maxProperties": 0}]},
    {
        "type": "object",
        "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
        "required": ["next"],
        "additionalProperties": False,
    },
]  # fmt: skip

# hypothesis-jsonschema makes no objects with this Hypothesis, and no recursive values.
OBJECTS: dict[int, st.SearchStrategy[Any]] = {
    7: st.fixed_dictionaries({"b": st.booleans()}, optional={"a": st.integers()}),
    8: st.sampled_from([None, {}]),
    9: st.recursive(st.just({"next": None}), lambda inner: st.fixed_dictionaries({"next": inner})),
}


def compiled(schema: dict[str, Any]) -> CompiledGrammar:
    return TRIE.compile(GrammarSpec(json_grammar(schema)))


def accepts(grammar: CompiledGrammar, tokens: list[int]) -> bool:
    """Whether the answer may be these tokens and end there."""
    matcher = grammar.matcher.deep_copy()
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


def split(text: str, chance: random.Random) -> list[int]:
    """Some tokenization of the text: BPE of pieces cut anywhere, also within characters."""
    tokens: list[int] = []
    data = text.encode()
    while data:
        size = chance.randint(1, 6)
        piece, data = data[:size], data[size:]
        tokens += TRIE.tokenizer.tokenize_bytes(piece)
    return tokens


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_random_walks_under_the_mask_end_and_validate(schema: dict[str, Any]) -> None:
    grammar = compiled(schema)
    for seed in range(25):
        text = TRIE.tokenizer.decode_bytes(walk(TRIE, grammar, seed)).decode()
        assert jsonschema_rs.is_valid(schema, json.loads(text)), text


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_values_of_a_schema_are_accepted_in_any_tokenization_and_mutants_are_not(
    number: int,
) -> None:
    schema = SCHEMAS[number]
    grammar = compiled(schema)
    values = OBJECTS[number] if number in OBJECTS else from_schema(schema)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(value=values, seed=st.integers(0, 1 << 20))
    def check(value: Any, seed: int) -> None:
        if isinstance(value, float):
            value = round(value, 6) + 0.0  # no exponents: llguidance writes numbers plainly
        if not jsonschema_rs.is_valid(schema, value) or "\x7f" in str(value):
            return  # llguidance writes no DEL: the one character that is missing
        text = json.dumps(_in_schema_order(schema, value), ensure_ascii=False)
        chance = random.Random(seed)
        if "e-" not in text:
            assert accepts(grammar, split(text, chance)), text
        mutant = list(text)
        mutant[chance.randrange(len(mutant))] = chance.choice('0a"{}[],:.-')
        changed = "".join(mutant)
        try:
            valid = jsonschema_rs.is_valid(schema, json.loads(changed))
        except ValueError:
            valid = False
        if not valid:
            assert not accepts(grammar, split(changed, chance)), changed

    check()


def _in_schema_order(schema: dict[str, Any], value: Any) -> Any:
    """Answers have the properties in the schema's order."""
    if not isinstance(value, dict):
        return value
    return {name: value[name] for name in schema.get("properties", value) if name in value} or value


@pytest.mark.parametrize("after", ["</think>", "<|im_start|>"], ids=["text", "special token"])
@pytest.mark.parametrize(
    "grammar", ['start: "yes" | "no"', json_grammar({"enum": ["yes", "no"]})], ids=["lark", "json"]
)
def test_a_grammar_may_begin_after_a_text_or_a_special_token(grammar: str, after: str) -> None:
    compiled_after = TRIE.compile(GrammarSpec(grammar, after))
    start = BACKEND.token_to_id(after)
    marker = [start] if start is not None else TRIE.tokenizer.tokenize_str(after)
    free = TRIE.tokenizer.tokenize_str("hm, {free}\n")
    answers = ["yes", '"yes"']
    right = [accepts(compiled_after, free + marker + BACKEND.encode(a).ids) for a in answers]
    assert right.count(True) == 1
    assert not accepts(compiled_after, free)
    assert not accepts(compiled_after, free + marker + BACKEND.encode("maybe").ids)


def test_copies_of_a_grammar_move_alone() -> None:
    grammar = compiled(SCHEMAS[7])
    first = walk(TRIE, grammar, 1)
    assert walk(TRIE, grammar, 1) == first


def test_a_keyword_that_cannot_be_enforced_is_named() -> None:
    with pytest.raises(GrammarRefused, match="uniqueItems"):
        compiled({"type": "array", "uniqueItems": True})
