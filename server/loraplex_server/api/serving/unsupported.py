"""Fields that would change the answer if they were honoured: refused, not ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from loraplex_server.api.errors import invalid

__all__ = ["refuse_unsupported"]


def _given(value: object) -> bool:
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
_REFUSED: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "functions": (_given, "the older form of tool calls is not supported; use tools"),
    "function_call": (_forces_tool, "the older form is not supported; use tool_choice"),
    "modalities": (_more_than_text, "only text is supported"),
    "audio": (_given, "only text is supported"),
    "prompt_embeds": (_given, "tensors are not accepted over HTTP"),
    "use_beam_search": (_given, "beam search is not supported"),
    "chat_template": (_given, "templates come from the model or the adapter, never from a request"),
    "bad_words": (_given, "bad_words is not supported; use logit_bias"),
    "allowed_token_ids": (_given, "allowed_token_ids is not supported; use logit_bias"),
    "normalize": (_is_told, "it is called use_activation"),
    "padding": (_pads, "prompts are never padded"),
    "suffix": (_given, "insertion is not supported"),
}


def refuse_unsupported(fields: Mapping[str, object]) -> None:
    """Raises ApiError (400, code ``unsupported_parameter``) for the first such field."""
    for name, value in fields.items():
        rule = _REFUSED.get(name)
        if rule is not None and rule[0](value):
            raise invalid(f"{name!r}: {rule[1]}", name, "unsupported_parameter")
