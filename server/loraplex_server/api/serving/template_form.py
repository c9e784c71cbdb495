"""How an answer is written that an adapter's own ``response_template`` shall read.

A grammar needs markers around JSON. They are derived from the template and then tried on it: what
it does not read back as it was written is not constrained, but refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pydantic import JsonValue
from transformers.utils.chat_parsing.response_templates import (
    ResponseTemplate,
    ResponseTemplateField,
    load_response_template,
)

from loraplex_server.api.errors import ApiError, invalid

from .chat_protocol import CallForm, ChatProtocol, Markers
from .message_parser import REASONING_FIELDS, ParsedMessage, ParserSpec
from .tool_use import ToolUse

__all__ = ["held_protocol"]

_Call = tuple[str, Mapping[str, JsonValue]]
_SAMPLES: list[_Call] = [
    ("first", {"text": 'a "quoted" [x], {y}\n', "n": -1.5, "list": [True, None, {}]}),
    ("second.tool-2", {}),
]
_TEXT = '{"a": [1, "b"]}'


def held_protocol(
    protocol: ChatProtocol, use: ToolUse, *, wanted_param: str | None, prompt: str
) -> ChatProtocol:
    """Without a response template, but with its markers. ``wanted_param``: what asks for a form.

    Raises ApiError (400) where a template does not read what a grammar could write.
    """
    if protocol.response_template is None:
        return protocol
    param = wanted_param or ("tool_choice" if use.required else "tools")
    template = load_response_template(dict(protocol.response_template))
    thinking = [field for name, field in template.fields.items() if name in REASONING_FIELDS]
    reasoning = _markers(thinking[0], param) if thinking else None
    trial = _Trial(protocol.response_template, prompt, reasoning)
    if wanted_param is not None or not use.required:
        _check_text(template, trial, param)
    calls = _calls(template, trial, param) if use.tools else protocol.calls
    return replace(protocol, calls=calls, reasoning=reasoning, response_template=None)


class _Trial:
    """Reads what a grammar could write as the template does."""

    def __init__(
        self, template: Mapping[str, JsonValue], prompt: str, reasoning: Markers | None
    ) -> None:
        self._spec = ParserSpec(template, prompt, reads_json=False, one_call=False)
        self._thought = ""
        end = prompt.rstrip()
        if reasoning is not None and end.endswith(reasoning.open):
            self._thought = f"hm{reasoning.close}"
        elif reasoning is not None and not end.endswith(reasoning.close):
            self._thought = f"{reasoning.open}hm{reasoning.close}"

    def reads(self, text: str, content: str, calls: Sequence[_Call]) -> bool:
        """Whether ``text``, with and without reasoning before it, is read as these."""
        opened_by_prompt = self._thought.startswith("hm")
        starts = {self._thought} if opened_by_prompt else {"", self._thought}
        return all(self._reads(start, text, content, calls) for start in starts)

    def _reads(self, thought: str, text: str, content: str, calls: Sequence[_Call]) -> bool:
        message = ParsedMessage.of(thought + text, self._spec)
        try:
            found = [(call.name, json.loads(call.arguments)) for call in message.calls]
        except ValueError:
            return False
        reasoning = "hm" if thought else ""
        return (message.content, message.reasoning, found) == (content, reasoning, list(calls))


def _check_text(template: ResponseTemplate, trial: _Trial, param: str) -> None:
    """Raises ApiError where text without markers is not content."""
    others = {*template.fields} - {"tool_calls", *REASONING_FIELDS, template.implicit}
    if others or template.implicit in (None, "tool_calls", *REASONING_FIELDS):
        raise _refused("text stands between markers of its own", param)
    if not trial.reads(_TEXT, _TEXT, []):
        raise _refused("it does not read plain text as the content", param)


def _calls(template: ResponseTemplate, trial: _Trial, param: str) -> CallForm:
    field = template.fields.get("tool_calls")
    if field is None:
        raise _refused("it has no field tool_calls", param)
    markers = _markers(field, param)
    for form in _forms(markers):
        one, both = (_written(form, _SAMPLES[:n]) for n in (1, 2))
        if trial.reads(one, "", _SAMPLES[:1]):
            several = trial.reads(both, "", _SAMPLES) and bool(form.is_array or markers.close)
            if several or not form.is_array:
                return form._replace(several=several)
    raise _refused("its calls are no JSON of a name and arguments", param)


def _forms(markers: Markers) -> list[CallForm]:
    """Those whose text a ``ToolCallReader`` reads; that with a list of calls comes first."""
    return [
        CallForm(*markers, is_array=is_array, arguments=key)
        for is_array in (True, False)
        for key in ("arguments", "parameters")
    ]


def _written(form: CallForm, calls: Sequence[_Call]) -> str:
    texts = [json.dumps({"name": name, form.arguments: given}) for name, given in calls]
    if form.is_array:
        return f"{form.open}[{', '.join(texts)}]{form.close}"
    return "\n".join(f"{form.open}{text}{form.close}" for text in texts)


def _markers(field: ResponseTemplateField, param: str) -> Markers:
    """The first of each; calls may go on to the end of the answer."""
    is_open_ended = field.close_re is None and field.name == "tool_calls"
    if not field.open_literals or not (field.close_literals or is_open_ended):
        raise _refused(f"{field.name} has no literal markers", param)
    return Markers(field.open_literals[0], (field.close_literals or [""])[0])


def _refused(why: str, param: str) -> ApiError:
    return invalid(
        "this adapter's answers cannot be held to a schema or a grammar, since its own "
        f"response_template would not read them: {why}. Ask with tool_choice 'auto' and without "
        "strict tools or a response format, or take response_template off the adapter's card",
        param,
        "response_template_not_held",
    )
