"""Writes the grammar that constrains an answer to the tools it may call."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple, cast

from pydantic import JsonValue

from loraplex_server.api.protocol.body import JsonObject
from loraplex_server.api.serving.text_generation.structured_output import (
    JSON_STYLE,
    RequestedGrammar,
    enforced,
)
from loraplex_server.engine.requests.grammar import GrammarSpec

from .tool_markup import ChatMarkup, Markers
from .tool_use import ToolUse

_ANY_OBJECT = {"type": "object"}


class PromptEnd(NamedTuple):
    """The part of the answer in the prompt: it may have opened or closed the reasoning."""

    in_reasoning: bool = False
    past_reasoning: bool = False

    @classmethod
    def of(cls, prompt: str, markers: Markers | None) -> PromptEnd:
        if markers is None:
            return cls(past_reasoning=True)
        end = prompt.rstrip()
        return cls(end.endswith(markers.open), end.endswith(markers.close))


def answer_grammar(
    requested: RequestedGrammar | None,
    use: ToolUse,
    markup: ChatMarkup,
    end: PromptEnd,
    token_of: Callable[[str], int | None] = lambda text: None,
) -> RequestedGrammar | None:
    """Return the grammar of an answer with tools; None: nothing is constrained.

    If a call is required, the answer is calls alone. Otherwise the answer is ``requested``, or free
    text with calls, where strict tools constrain their arguments. Free reasoning may come first.
    ``token_of`` returns the token of a marker that is a single token.
    """
    if requested is None and not use.constrained:
        return None
    if requested is not None and not use.tools and end.past_reasoning:
        return requested
    lark = _Lark(use, markup, end, token_of).text(requested)
    if requested is None or use.required:
        return RequestedGrammar("tools", GrammarSpec(lark))
    inner = _grammars(requested.spec)
    text = json.dumps({"grammars": [{"name": "answer", "lark_grammar": lark}, *inner]})
    return RequestedGrammar(requested.param, GrammarSpec(text))


class _Lark:
    """Writes the rules in llguidance's Lark.

    A marker that is one special token is written by its id, since its text would match ordinary
    tokens only. Other markers are written as text.
    """

    def __init__(
        self,
        use: ToolUse,
        markup: ChatMarkup,
        end: PromptEnd,
        token_of: Callable[[str], int | None],
    ) -> None:
        self._use, self._markup, self._end = use, markup.calls, end
        self._reasoning = None if end.past_reasoning else markup.reasoning
        self._token_of = token_of

    def text(self, requested: RequestedGrammar | None) -> str:
        use, form = self._use, self._markup
        rules = ["%llguidance {}", "TEXT: /(?s:.*)/"]
        if use.tools:
            rules += [f"open: {self._marker(form.open)}", self._body(), *self._calls()]
        if not use.required and requested is None:
            rules.append(self._up_to("free_open", form.open))
            repeat = "*" if use.parallel else "?"
            return "\n".join([*rules, f"start: (free_open body){repeat} TEXT"])
        thought = ""
        if self._reasoning is not None:
            thought = "thought " if self._end.in_reasoning else "(think thought)? "
            rules += [
                f"think: {self._marker(self._reasoning.open)}",
                "thought: thought_end BLANK",
                self._up_to("thought_end", self._reasoning.close),
                "BLANK: /[\\n ]{0,2}/",
            ]
        several = use.parallel and not form.is_array
        more = f" ({_quoted(chr(10))} open body)*" if several else ""
        choices = [f"open body{more}"] if use.tools else []
        if requested is not None and not use.required:
            choices.append("@requested")
        return "\n".join([*rules, f"start: {thought}({' | '.join(choices)})"])

    def _calls(self) -> list[str]:
        use = self._use
        rules = [f"call: {' | '.join(f'call_{number}' for number in range(len(use.tools)))}"]
        for number, tool in enumerate(use.tools):
            is_enforced = use.required or tool.strict
            parameters = tool.parameters if is_enforced else _ANY_OBJECT
            of_tool = enforced(cast(JsonValue, parameters), f"the schema of tool {tool.name!r}")
            schema = {"x-guidance": JSON_STYLE, **cast(JsonObject, of_tool)}
            head = f'{{"name": {json.dumps(tool.name)}, "arguments": '
            rules += [
                f"call_{number}: {_quoted(head)} args_{number} {_quoted('}')}",
                f"args_{number}: %json {json.dumps(schema)}",
            ]
        return rules

    def _body(self) -> str:
        """Allow an empty list of calls unless a call is required."""
        use, form = self._use, self._markup
        gap = f"{_quoted(form.gap)} " if form.gap else ""
        close = f" {gap}({self._marker(form.close)})"
        if not form.is_array:
            return f"body: {gap}call{close}"
        more = f" ({_quoted(', ')} call)*" if use.parallel else ""
        calls = f"call{more}" if use.required else f"(call{more})?"
        return f"body: {gap}{_quoted('[')} {calls} {_quoted(']')}{close}"

    def _marker(self, marker: str) -> str:
        token_id = self._token_of(marker)
        return _quoted(marker) if token_id is None else f"<[{token_id}]> | {_quoted(marker)}"

    def _up_to(self, rule: str, marker: str) -> str:
        """Return the rule of free text up to and with the first marker."""
        token_id, lazy = self._token_of(marker), f"{rule}_text"
        by_token = "" if token_id is None else f" | TEXT <[{token_id}]>"
        return f"{rule}: {lazy}{by_token}\n{lazy}[lazy]: /(?s:.*)/ {_quoted(marker)}"


def _grammars(spec: GrammarSpec) -> list[dict[str, object]]:
    if not spec.text.lstrip().startswith("{"):
        return [{"name": "requested", "lark_grammar": spec.text}]
    grammars: list[dict[str, object]] = json.loads(spec.text)["grammars"]
    return [{**grammars[0], "name": "requested"}, *grammars[1:]]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
