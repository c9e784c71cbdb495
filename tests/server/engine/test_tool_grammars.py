"""Walks with random logits over the grammars of tools: each ends, and is read as it was written.

The markers are tokens, so a walk also writes them into strings, where they are text.
"""

import itertools
import json
import random
from typing import Any, NamedTuple

import jsonschema_rs
import pytest
from tokenizers import AddedToken

from loraplex_server.api.protocol.tools import NamedToolChoice, ToolDefinition
from loraplex_server.api.serving.chat.message_parser import (
    MessageParser,
    ParsedMessage,
    ParserSpec,
)
from loraplex_server.api.serving.chat.structural_tags import StructuralTags
from loraplex_server.api.serving.chat.tool_grammar import PromptEnd, answer_grammar
from loraplex_server.api.serving.chat.tool_markup import (
    CallMarkup,
    ChatMarkup,
    Markers,
    chat_markup,
)
from loraplex_server.api.serving.chat.tool_use import ToolUse, tool_use
from loraplex_server.api.serving.text_generation.structured_output import requested_json
from loraplex_server.engine.requests.grammar import TokenTrie
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.support.grammar_walk import walk

MARKERS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "[CALL]", "[/CALL]"]
BACKEND = tiny_tokenizer().backend_tokenizer
BACKEND.add_tokens([AddedToken(marker, normalized=False) for marker in MARKERS])
TRIE = TokenTrie(BACKEND.to_str(), BACKEND.get_vocab_size(), {2})
LIKELY = {2, *(BACKEND.token_to_id(marker) for marker in MARKERS), *BACKEND.encode('"').ids}

SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 9},
            "days": {"type": "integer", "minimum": 0, "maximum": 14},
            "units": {"enum": ["C", "F", None]},
        },
        "required": ["city", "units"],
        "additionalProperties": False,
    },
    "run": {
        "type": "object",
        "properties": {
            "code": {"type": "string", "maxLength": 30},
            "env": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
        "required": ["code", "env"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
THINK = Markers("<think>", "</think>")
ENDS = {"no": None, "may": PromptEnd(), "opened": PromptEnd(in_reasoning=True)}
FORMS = {
    # the shipped base's template shows no tools, so it gets SmolLM2's
    "array": chat_markup(None, "<|im_start|>{{ messages }}", with_tools=True).calls,
    "hermes": chat_markup(None, "tools <tool_call>\n{", with_tools=True).calls,
    "brackets": CallMarkup("[CALL]", "[/CALL]", is_array=False),
}


class Case(NamedTuple):
    form: str
    choice: str  # "required", "named" or "auto"
    parallel: bool
    reasoning: str
    wanted: bool = False  # a response format beside the tools

    def use(self) -> ToolUse:
        tools = [
            ToolDefinition.model_validate(
                {"type": "function", "function": {"name": n, "parameters": s, "strict": n != "now"}}
            )
            for n, s in SCHEMAS.items()
        ]
        named = NamedToolChoice.model_validate({"type": "function", "function": {"name": "run"}})
        choice: Any = {"named": named}.get(self.choice, self.choice)
        return tool_use(tools, choice, parallel=self.parallel)


CASES = [
    *(
        Case(*case)
        for case in itertools.product(FORMS, ("required", "named", "auto"), (True, False), ENDS)
    ),
    *(Case(form, "auto", True, reasoning, wanted=True) for form in FORMS for reasoning in ENDS),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_walks_end_and_are_read_as_they_were_written(case: Case) -> None:
    use, end = case.use(), ENDS[case.reasoning]
    reasoning = None if end is None else THINK
    protocol = ChatMarkup(None, FORMS[case.form], reasoning)
    wanted = requested_json("response_format", {"enum": ["a", {"b": "[CALL]"}]})
    asked = wanted if case.wanted else None
    grammar = answer_grammar(
        asked, use, protocol, end or PromptEnd.of("", None), BACKEND.token_to_id
    )
    assert grammar is not None
    compiled = TRIE.compile(grammar.spec)
    spec = _spec(protocol, case, end)
    for seed in range(4):
        tokens = walk(TRIE, compiled, seed, likely=LIKELY)
        text = TRIE.tokenizer.decode_bytes(tokens).decode()
        message = _parsed(text, spec)
        assert _in_pieces(text, spec, random.Random(seed)) == _told(message), text
        for call in message.calls:
            # ``now`` is not strict: any object will do unless a call is required
            loose = call.name == "now" and case.choice == "auto"
            schema = {"type": "object"} if loose else SCHEMAS[call.name]
            assert jsonschema_rs.is_valid(schema, json.loads(call.arguments)), text
        if case.choice == "auto" and not case.wanted:
            _check_free(case, message, text)
        else:
            _check_held(case, message, text)


def _check_held(case: Case, message: ParsedMessage, text: str) -> None:
    """By hand: the reasoning up to its first end, then calls, or what is wanted."""
    thought = ""
    if case.reasoning == "opened" or (case.reasoning == "may" and text.startswith(THINK.open)):
        thought, text = text.removeprefix(THINK.open).split(THINK.close, 1)
        text = text.lstrip("\n ")
    assert message.reasoning == thought.strip()
    form = FORMS[case.form]
    if case.wanted and not text.startswith(form.open):
        assert (message.content, message.calls) == (text, [])
        return
    calls, rest = [], text
    while rest:
        rest = rest.removeprefix("\n").removeprefix(form.open)
        region, at = json.JSONDecoder().raw_decode(rest.lstrip("\n"))
        rest = rest.lstrip("\n")[at:].removeprefix("\n")
        assert rest.startswith(form.close), text
        rest = rest.removeprefix(form.close)
        calls += region if form.is_array else [region]
    assert _told(message)[2] == [(call["name"], call["arguments"]) for call in calls]
    assert message.content == ""
    if case.choice != "auto":
        assert calls
        assert case.parallel or len(calls) == 1


def _check_free(case: Case, message: ParsedMessage, text: str) -> None:
    """Every region that opens in the text holds calls: nothing in a marker is left over."""
    form = FORMS[case.form]
    if case.parallel and case.reasoning == "no":
        rest, calls = text, []
        while form.open in rest:
            rest = rest.split(form.open, 1)[1].lstrip("\n")
            region, at = json.JSONDecoder().raw_decode(rest)
            rest = rest[at:].removeprefix(form.gap)
            assert rest.startswith(form.close), text
            calls += region if form.is_array else [region]
        assert _told(message)[2] == [(call["name"], call["arguments"]) for call in calls]
        assert form.open not in message.content
    if not case.parallel:
        assert len(message.calls) <= 1


def _spec(protocol: ChatMarkup, case: Case, end: PromptEnd | None) -> ParserSpec:
    held = StructuralTags.of(
        protocol,
        with_calls=True,
        in_reasoning=end is not None and end.in_reasoning,
        past_reasoning=end is None,
        is_free=case.choice == "auto" and not case.wanted,
    )
    return ParserSpec.of(
        protocol,
        with_calls=True,
        one_call=not case.parallel,
        prompt=THINK.open if case.reasoning == "opened" else "",
        tags=held,
    )


def _parsed(text: str, spec: ParserSpec) -> ParsedMessage:
    parser = MessageParser(spec)
    return ParsedMessage.joined([*parser.feed(text), *parser.finish()])


def _told(message: ParsedMessage) -> tuple[str, str, list[tuple[str, Any]]]:
    calls = [(call.name, json.loads(call.arguments)) for call in message.calls]
    return message.content, message.reasoning, calls


def _in_pieces(
    text: str, spec: ParserSpec, chance: random.Random
) -> tuple[str, str, list[tuple[str, Any]]]:
    """As a stream brings it."""
    parser = MessageParser(spec)
    pieces = []
    while text:
        size = chance.randint(1, 5)
        pieces += parser.feed(text[:size])
        text = text[size:]
    pieces += parser.finish()
    names = [piece.name for piece in pieces if piece.kind == "call" and piece.name is not None]
    written = [""] * len(names)
    for piece in pieces:
        if piece.kind == "call":
            written[piece.number] += piece.text
    content = "".join(piece.text for piece in pieces if piece.kind == "content")
    reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
    calls = [(name, json.loads(text)) for name, text in zip(names, written, strict=True)]
    return content, reasoning, calls


def test_a_walk_writes_markers_into_strings() -> None:
    """Otherwise the walks above would not prove that they are text there."""
    case = Case("brackets", "named", True, "no")
    protocol = ChatMarkup(None, FORMS["brackets"], None)
    end = PromptEnd.of("", None)
    grammar = answer_grammar(None, case.use(), protocol, end, BACKEND.token_to_id)
    assert grammar is not None
    compiled = TRIE.compile(grammar.spec)
    spec = _spec(protocol, case, None)
    codes = [
        json.loads(call.arguments)["code"]
        for seed in range(12)
        for call in _parsed(
            TRIE.tokenizer.decode_bytes(walk(TRIE, compiled, seed, likely=LIKELY)).decode(), spec
        ).calls
    ]
    assert any("[/CALL]" in code for code in codes)
    assert any("[CALL]" in code for code in codes)
