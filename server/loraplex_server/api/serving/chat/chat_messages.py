"""Turns chat messages into the form that templates read: a role and a text."""

import contextlib
import json
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from loraplex_adapter_store.files.json_size import check_depth
from loraplex_server.api.json_size import TOO_DEEP
from loraplex_server.api.protocol.chat import ChatMessage
from loraplex_server.errors import invalid

from .image_parts import IMAGE_TYPES

_MAX_ARGUMENTS_CHARS = 1 << 20  # JSON within JSON, which is parsed on the event loop
_MAX_SYSTEM_CHARS = 200  # a longer text would outweigh the user's turn
# Arguments of apply_chat_template that a client must not set (CVE-2025-62426 and kin).
_RESERVED = frozenset(
    {
        *("conversation", "messages", "tools", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "self", "template", "load_audio_from_video", "processor_kwargs"),
    }
)


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, object]]:
    """Join the text parts of each message without images. Raises ApiError (400) for other content.

    The content of a message with images is a list of texts and of ``{"type": "image"}``.
    """
    _check_arguments(messages)
    plain = []
    for position, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        shown: dict[str, object] = {"role": role, "content": _content(message.content, position)}
        for name in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(message, name)
            if value is not None:
                shown[name] = value
        if message.tool_calls:
            where = f"messages[{position}].tool_calls"
            shown["tool_calls"] = [
                _call(call, f"{where}[{number}]") for number, call in enumerate(message.tool_calls)
            ]
        plain.append(shown)
    return plain


def routing_text(messages: Sequence[Mapping[str, object]]) -> str:
    """Return the text that ``auto`` routing is based on: start of system, last user turn."""
    user = [message for message in messages if message["role"] == "user"]
    last = _text_of((user or messages)[-1]["content"])
    system = [_text_of(message["content"]) for message in messages if message["role"] == "system"]
    return f"{system[0][:_MAX_SYSTEM_CHARS]}\n{last}" if user and system else last


def with_turns(
    messages: Sequence[dict[str, object]], turns: Sequence[tuple[str, str]]
) -> list[dict[str, object]]:
    """Insert examples as earlier turns, after the system messages at the start."""
    examples: list[dict[str, object]] = []
    for prompt, answer in turns:
        examples.append({"role": "user", "content": prompt})
        examples.append({"role": "assistant", "content": answer})
    first = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    return [*messages[:first], *examples, *messages[first:]]


def template_arguments(arguments: Mapping[str, object] | None) -> dict[str, object]:
    """Raises ApiError (400) for arguments that steer the tokenizer rather than the template."""
    for name in arguments or {}:
        if name in _RESERVED or not name.isidentifier() or name.startswith("_"):
            raise invalid(
                f"chat_template_kwargs must not set {name[:64]!r}", "chat_template_kwargs"
            )
    return dict(arguments or {})


def _check_arguments(messages: Sequence[ChatMessage]) -> None:
    """Check the size of the arguments before they are parsed. Raises ApiError (400)."""
    functions = [call.get("function") for message in messages for call in message.tool_calls or ()]
    texts = [function.get("arguments") for function in functions if isinstance(function, dict)]
    n_chars = sum(len(text) for text in texts if isinstance(text, str))
    if n_chars > _MAX_ARGUMENTS_CHARS:
        raise invalid(
            f"the arguments of the tool calls are {n_chars:,} characters long together, at most "
            f"{_MAX_ARGUMENTS_CHARS:,} are read",
            "messages",
            "arguments_too_large",
        )


def _call(call: Mapping[str, JsonValue], where: str) -> dict[str, object]:
    """Return the call with its arguments as an object. Raises ApiError (400).

    Arguments that are no JSON go to the template as text. Null and empty arguments become ``{}``.
    """
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid("a tool call needs a function with a name", f"{where}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            check_depth(arguments)
        except ValueError as error:
            raise invalid(
                f"arguments of a call: {error}", f"{where}.function.arguments", TOO_DEEP.code
            ) from None
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    return {**call, "type": "function", "function": {**function, "arguments": arguments or {}}}


def _content(
    content: str | Sequence[Mapping[str, JsonValue]] | None, position: int
) -> str | list[dict[str, str]]:
    if content is None or isinstance(content, str):
        return content or ""
    parts: list[dict[str, str]] = []
    for number, part in enumerate(content):
        where = f"messages[{position}].content[{number}]"
        match part.get("type"):
            case "text":
                text = part.get("text")
                if not isinstance(text, str):
                    raise invalid("a text part needs a string 'text'", f"{where}.text")
                parts.append({"type": "text", "text": text})
            case kind if kind in IMAGE_TYPES:
                parts.append({"type": "image"})
            case kind:
                raise invalid(
                    f"content of type {kind!r} is not supported: this server takes text, and with "
                    f"a vision-language base {' and '.join(IMAGE_TYPES)}",
                    where,
                    "unsupported_content",
                )
    has_images = any(part["type"] == "image" for part in parts)
    return parts if has_images else "".join(part["text"] for part in parts)


def _text_of(content: object) -> str:
    """Return the texts of a message's content."""
    if not isinstance(content, list):
        return str(content)
    return "".join(part.get("text", "") for part in content)
