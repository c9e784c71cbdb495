"""Anthropic's bodies as chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from loraplex_server.api.errors import invalid
from loraplex_server.api.protocol.chat import ChatBody
from loraplex_server.api.protocol.generation import AdapterBody, CallBody
from loraplex_server.api.protocol.messages import CountTokensBody, MessagesBody

from .unsupported import Rules, given, of_chat, refuse_unsupported

__all__ = ["chat_of_count", "chat_of_messages"]


def _thinks(value: object) -> bool:
    return isinstance(value, dict) and value.get("type") == "enabled"


_REFUSED: Rules = {
    **of_chat(MessagesBody.model_fields),
    "stop": (given, "it is called stop_sequences here"),
    "tools": (given, "tool calls are not supported on this route yet"),
    "tool_choice": (given, "tool calls are not supported on this route yet"),
    "thinking": (_thinks, "there is no thinking budget to set"),
    "mcp_servers": (given, "this server calls no others"),
    "container": (given, "this server runs no code"),
    "context_management": (given, "messages are taken as they are"),
}
_CALL_FIELDS = tuple(CallBody.model_fields)
_ADAPTER_FIELDS = tuple(AdapterBody.model_fields)


def chat_of_messages(body: MessagesBody) -> ChatBody:
    """Raises ApiError (400), which names Anthropic's fields."""
    refuse_unsupported(body.model_extra or {}, _REFUSED)
    fields = {name: getattr(body, name) for name in _CALL_FIELDS}
    return _chat(body, max_tokens=body.max_tokens, stop=body.stop_sequences, **fields)


def chat_of_count(body: CountTokensBody) -> ChatBody:
    """Raises ApiError (400)."""
    refuse_unsupported(body.model_extra or {}, _REFUSED)
    return _chat(body, **{name: getattr(body, name) for name in _ADAPTER_FIELDS})


def _chat(body: CountTokensBody, **fields: object) -> ChatBody:
    messages = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for position, turn in enumerate(body.messages):
        content = _text(turn.content, f"messages[{position}].content")
        if messages and messages[-1]["role"] == turn.role:  # they are one turn
            messages[-1]["content"] += f"\n{content}"
        else:
            messages.append({"role": turn.role, "content": content})
    return ChatBody.model_validate(
        {
            **fields,
            "messages": messages,
            # Anthropic's "prefill": the answer goes on where the last message ends.
            "continue_final_message": body.messages[-1].role == "assistant",
        }
    )


def _text(content: str | Sequence[Mapping[str, JsonValue]], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for number, block in enumerate(content):
        kind = block.get("type")
        if kind != "text":
            raise invalid(
                f"a block of type {str(kind)[:64]!r} is not supported on this route: it takes text",
                f"{where}[{number}]",
                "unsupported_content",
            )
        text = block.get("text")
        if not isinstance(text, str):
            raise invalid("a text block needs a string 'text'", f"{where}[{number}].text")
        texts.append(text)
    return "\n".join(texts)
