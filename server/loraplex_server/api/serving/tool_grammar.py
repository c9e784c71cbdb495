"""The grammar that holds an answer to the tools it may call."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

from loraplex_server.engine.grammar import GrammarSpec

from .chat_protocol import ChatProtocol, Markers
from .structured_output import Wanted
from .tool_use import ToolUse

__all__ = ["PromptEnd", "answer_grammar"]

# As json.dumps writes, which is how templates show earlier calls.
_AS_DUMPED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_OBJECT = {"type": "object"}


class PromptEnd(NamedTuple):
    """What the chat template wrote of the answer: it may have opened or closed the reasoning."""

    in_reasoning: bool = False
    past_reasoning: bool = False

    @classmethod
    def of(cls, prompt: str, markers: Markers | None) -> PromptEnd:
        if markers is None:
            return cls(past_reasoning=True)
        end = prompt.rstrip()
        return cls(end.endswith(markers.open), end.endswith(markers.close))


def answer_grammar(
    wanted: Wanted | None,
    use: ToolUse,
    protocol: ChatProtocol,
    end: PromptEnd,
    token_of: Callable[[str], int | None] = lambda text: None,
) -> Wanted | None:
    """``wanted``: what the answer must be if it is no call. None: nothing is constrained.
    ``token_of``: the token that a marker is by itself, if it is one.

    Where a call is required, the answer is calls and nothing else. Where it is not, the answer is
    ``wanted``, or free text with calls in it, whose arguments are held to the schema where the tool
    is strict. Reasoning comes before all of it, and is free.
    """
    if wanted is None and not use.constrained:
        return None
    if wanted is not None and not use.tools and end.past_reasoning:
        return wanted
    text = lark = _Lark(use, protocol, end, token_of).text(wanted)
    if wanted is not None and not use.required:
        inner = _grammars(wanted.spec)
        text = json.dumps({"grammars": [{"name": "answer", "lark_grammar": lark}, *inner]})
    param = wanted.param if wanted is not None and not use.required else "tools"
    return Wanted(param, GrammarSpec(text))


class _Lark:
    """Rules in llguidance's Lark.

    A marker may be a token by itself, which its text does not match, or written in pieces.
    """

    def __init__(
        self,
        use: ToolUse,
        protocol: ChatProtocol,
        end: PromptEnd,
        token_of: Callable[[str], int | None],
    ) -> None:
        self._use, self._form, self._end = use, protocol.calls, end
        self._reasoning = None if end.past_reasoning else protocol.reasoning
        self._token_of = token_of

    def text(self, wanted: Wanted | None) -> str:
        use, form = self._use, self._form
        rules = ["%llguidance {}", "TEXT: /(?s:.*)/"]
        if use.tools:
            rules += [f"open: {self._marker(form.open)}", self._body(), *self._calls()]
        if not use.required and wanted is None:
            rules.append(self._up_to("free_open", form.open))
            repeat = "*" if use.parallel and form.several else "?"
            free = f"(free_open body){repeat} TEXT" if form.close else "free_open body | TEXT"
            return "\n".join([*rules, f"start: {free}"])
        thought = ""
        if self._reasoning is not None:
            thought = "thought " if self._end.in_reasoning else "(think thought)? "
            rules += [
                f"think: {self._marker(self._reasoning.open)}",
                "thought: thought_end BLANK",
                self._up_to("thought_end", self._reasoning.close),
                "BLANK: /[\\n ]{0,2}/",
            ]
        several = use.parallel and form.several and not form.is_array
        more = f" ({_quoted(chr(10))} open body)*" if several else ""
        choices = [f"open body{more}"] if use.tools else []
        if wanted is not None and not use.required:
            choices.append("@wanted")
        return "\n".join([*rules, f"start: {thought}({' | '.join(choices)})"])

    def _calls(self) -> list[str]:
        use = self._use
        rules = [f"call: {' | '.join(f'call_{number}' for number in range(len(use.tools)))}"]
        for number, tool in enumerate(use.tools):
            enforced = use.required or tool.strict
            schema = {"x-guidance": _AS_DUMPED, **(tool.parameters if enforced else _ANY_OBJECT)}
            head = f'{{"name": {json.dumps(tool.name)}, "{self._form.arguments}": '
            rules += [
                f"call_{number}: {_quoted(head)} args_{number} {_quoted('}')}",
                f"args_{number}: %json {json.dumps(schema)}",
            ]
        return rules

    def _body(self) -> str:
        """An empty list says that no tool fits; where a call is required it is not allowed."""
        use, form = self._use, self._form
        gap = f"{_quoted(form.gap)} " if form.gap else ""
        close = f" {gap}({self._marker(form.close)})" if form.close else ""
        if not form.is_array:
            return f"body: {gap}call{close}"
        more = f" ({_quoted(', ')} call)*" if use.parallel else ""
        calls = f"call{more}" if use.required else f"(call{more})?"
        return f"body: {gap}{_quoted('[')} {calls} {_quoted(']')}{close}"

    def _marker(self, marker: str) -> str:
        token_id = self._token_of(marker)
        return _quoted(marker) if token_id is None else f"<[{token_id}]> | {_quoted(marker)}"

    def _up_to(self, rule: str, marker: str) -> str:
        """Free text up to the marker's first place, and the marker."""
        token_id, lazy = self._token_of(marker), f"{rule}_text"
        by_token = "" if token_id is None else f" | TEXT <[{token_id}]>"
        return f"{rule}: {lazy}{by_token}\n{lazy}[lazy]: /(?s:.*)/ {_quoted(marker)}"


def _grammars(spec: GrammarSpec) -> list[dict[str, object]]:
    if not spec.text.lstrip().startswith("{"):
        return [{"name": "wanted", "lark_grammar": spec.text}]
    grammars: list[dict[str, object]] = json.loads(spec.text)["grammars"]
    return [{**grammars[0], "name": "wanted"}, *grammars[1:]]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
