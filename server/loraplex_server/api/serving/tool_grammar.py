"""The grammar that holds an answer to the tools it may call."""

from __future__ import annotations

import json
from typing import NamedTuple

from loraplex_server.engine.grammar import GrammarSpec

from .chat_protocol import CallForm, ChatProtocol, Markers
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
    wanted: Wanted | None, use: ToolUse, protocol: ChatProtocol, end: PromptEnd
) -> Wanted | None:
    """``wanted``: what the answer must be if it is no call. None: nothing is constrained.

    Where a call is required, the answer is calls and nothing else. Where it is not, the answer is
    ``wanted``, or free text with calls in it, whose arguments are held to the schema where the tool
    is strict. Reasoning comes before all of it, and is free.
    """
    if wanted is None and not use.constrained:
        return None
    if wanted is not None and not use.tools and end.past_reasoning:
        return wanted
    text = lark = _lark(wanted, use, protocol, end)
    if wanted is not None and not use.required:
        inner = _grammars(wanted.spec)
        text = json.dumps({"grammars": [{"name": "answer", "lark_grammar": lark}, *inner]})
    param = wanted.param if wanted is not None and not use.required else "tools"
    return Wanted(param, GrammarSpec(text))


def _lark(wanted: Wanted | None, use: ToolUse, protocol: ChatProtocol, end: PromptEnd) -> str:
    form = protocol.calls
    rules = ["%llguidance {}"]
    thought = ""
    if protocol.reasoning is not None and not end.past_reasoning:
        thought = "thought " if end.in_reasoning else "(THINK thought)? "
        rules += [
            f"THINK: {_quoted(protocol.reasoning.open)}",
            "thought: thought_end BLANK",
            f"thought_end[lazy]: /(?s:.*)/ {_quoted(protocol.reasoning.close)}",
            "BLANK: /[\\n ]{0,2}/",
        ]
    if use.tools:
        rules += _call_rules(use, form)
    if use.required or wanted is not None:
        several = use.parallel and not form.is_array
        more = f" ({_quoted(chr(10))} OPEN body)*" if several else ""
        calls = f"OPEN body{more}" if use.tools else ""
        choices = [calls, "" if use.required or wanted is None else "@wanted"]
        rules.append(f"start: {thought}({' | '.join(choice for choice in choices if choice)})")
    else:
        repeat = "*" if use.parallel else "?"
        rules.append(f"start: (free_open body){repeat} TEXT")
        rules += [f"free_open[lazy]: TEXT {_quoted(form.open)}", "TEXT: /(?s:.*)/"]
    return "\n".join(rules)


def _call_rules(use: ToolUse, form: CallForm) -> list[str]:
    calls = " | ".join(f"call_{number}" for number in range(len(use.tools)))
    rules = [f"OPEN: {_quoted(form.open)}", _body(form, use), f"call: {calls}"]
    for number, tool in enumerate(use.tools):
        enforced = use.required or tool.strict
        schema = {"x-guidance": _AS_DUMPED, **(tool.parameters if enforced else _ANY_OBJECT)}
        head = f'{{"name": {json.dumps(tool.name)}, "arguments": '
        rules += [
            f"call_{number}: {_quoted(head)} args_{number} {_quoted('}')}",
            f"args_{number}: %json {json.dumps(schema)}",
        ]
    return rules


def _body(form: CallForm, use: ToolUse) -> str:
    """An empty list says that no tool fits; where a call is required it is not allowed."""
    gap = f"{_quoted(form.gap)} " if form.gap else ""
    close = _quoted(form.gap + form.close)
    if not form.is_array:
        return f"body: {gap}call {close}"
    more = f" ({_quoted(', ')} call)*" if use.parallel else ""
    calls = f"call{more}" if use.required else f"(call{more})?"
    return f"body: {gap}{_quoted('[')} {calls} {_quoted(']')} {close}"


def _grammars(spec: GrammarSpec) -> list[dict[str, object]]:
    if not spec.text.lstrip().startswith("{"):
        return [{"name": "wanted", "lark_grammar": spec.text}]
    grammars: list[dict[str, object]] = json.loads(spec.text)["grammars"]
    return [{**grammars[0], "name": "wanted"}, *grammars[1:]]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
