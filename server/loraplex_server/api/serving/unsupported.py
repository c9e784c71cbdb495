"""Fields that would change the answer if they were honoured: refused, not ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from loraplex_server.api.errors import invalid
from loraplex_server.api.protocol.chat import ChatBody

__all__ = ["OF_TEXT", "Rules", "given", "of_chat", "refuse_unsupported"]


def given(value: object) -> bool:
    return value not in (None, [], {}, False, "")


def _forces_tool(value: object) -> bool:
    return value not in (None, "none", "auto")


def _more_than_text(value: object) -> bool:
    return value not in (None, ["text"])


def _is_told(value: object) -> bool:
    return value is not None


def _pads(value: object) -> bool:
    return value not in (None, "do_not_pad")


# field → (is the value a request for something we do not do?, what it would need)
Rules = Mapping[str, tuple[Callable[[object], bool], str]]

_REFUSED: Rules = {
    "functions": (given, "the older form of tool calls is not supported; use tools"),
    "function_call": (_forces_tool, "the older form is not supported; use tool_choice"),
    "modalities": (_more_than_text, "only text is supported"),
    "audio": (given, "only text is supported"),
    "prompt_embeds": (given, "tensors are not accepted over HTTP"),
    "use_beam_search": (given, "beam search is not supported"),
    "chat_template": (given, "templates come from the model or the adapter, never from a request"),
    "normalize": (_is_told, "it is called use_activation"),
    "padding": (_pads, "prompts are never padded"),
    "suffix": (given, "insertion is not supported"),
}
# Of chats and completions; what one of them does is a field of its body and not looked up here.
OF_TEXT: Rules = {
    **_REFUSED,
    "truncate_prompt_tokens": (_is_told, "a prompt is not cut before it is answered; shorten it"),
    "echo": (given, "only /v1/completions repeats a prompt"),
    "add_special_tokens": (given, "a chat has the special tokens of its template"),
}


def refuse_unsupported(fields: Mapping[str, object], rules: Rules = _REFUSED) -> None:
    """Raises ApiError (400, code ``unsupported_parameter``) for the first such field."""
    for name, value in fields.items():
        rule = rules.get(name)
        if rule is not None and rule[0](value):
            raise invalid(f"{name!r}: {rule[1]}", name, "unsupported_parameter")


def of_chat(own: Iterable[str]) -> Rules:
    """Fields of a chat that another API, which has its ``own``, does not take."""
    told = "it is a field of /v1/chat/completions and has no meaning here"
    return dict.fromkeys({*OF_TEXT, *ChatBody.model_fields} - {*own}, (given, told))
