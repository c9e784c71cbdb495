"""Translates bodies of Anthropic's API into chats."""

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import orjson
from pydantic import JsonValue

from loraplex_server.api.protocol.body import JsonObject
from loraplex_server.api.protocol.chat import MAX_MESSAGES, ChatBody
from loraplex_server.api.protocol.generation import CallBody
from loraplex_server.api.protocol.messages import (
    CountTokensBody,
    MessagesBody,
    MessageTool,
    MessageToolChoice,
    MessageTurn,
)
from loraplex_server.api.serving.content_blocks import string_field, texts_of
from loraplex_server.api.serving.unsupported import Rules, is_set, of_chat, refuse_unsupported
from loraplex_server.errors import ApiError, invalid


def _thinks(value: object) -> bool:
    return isinstance(value, dict) and value.get("type") == "enabled"


_REFUSED: Rules = {
    **of_chat(MessagesBody.model_fields),
    "stop": (is_set, "it is called stop_sequences here"),
    "thinking": (_thinks, "thinking budgets are not supported"),
    "mcp_servers": (is_set, "this server calls no other servers"),
    "container": (is_set, "this server runs no code"),
    "context_management": (is_set, "messages are used unchanged"),
}
_CALL_FIELDS = tuple(CallBody.model_fields)


def chat_of_messages(body: MessagesBody) -> ChatBody:
    """Return the chat of a body. Raises ApiError (400), which names Anthropic's fields."""
    refuse_unsupported(body.model_extra or {}, _REFUSED)
    fields = {name: getattr(body, name) for name in _CALL_FIELDS}
    return _chat(body, max_tokens=body.max_tokens, stop=body.stop_sequences, **fields)


def chat_of_count(body: CountTokensBody) -> ChatBody:
    """Return the chat whose tokens are counted. Raises ApiError (400)."""
    refuse_unsupported(body.model_extra or {}, _REFUSED)
    return _chat(body, **body.adapter_fields)


def _chat(body: CountTokensBody, **fields: object) -> ChatBody:
    messages: list[JsonObject] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for position, turn in enumerate(body.messages):
        for message in _messages(turn, f"messages[{position}].content"):
            _append(messages, message)
    if len(messages) > MAX_MESSAGES:
        raise invalid(
            f"system, turns and tool results make {len(messages)} messages, "
            f"{MAX_MESSAGES} are allowed",
            "messages",
        )
    choice = body.tool_choice
    return ChatBody.model_validate(
        {
            **fields,
            "messages": messages,
            "tools": [_tool(tool) for tool in body.tools or ()],
            "tool_choice": None if choice is None else _choice(choice),
            "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
            # Anthropic's "prefill": the answer continues the last message.
            "continue_final_message": body.messages[-1].role == "assistant",
        }
    )


def _tool(tool: MessageTool) -> dict[str, object]:
    function = tool.model_dump(include={"name", "description", "strict"})
    return {"type": "function", "function": {**function, "parameters": tool.input_schema}}


def _choice(choice: MessageToolChoice) -> object:
    if choice.type != "tool":
        return "required" if choice.type == "any" else choice.type
    if choice.name is None:
        raise invalid("a tool_choice of type 'tool' needs a name", "tool_choice.name")
    return {"type": "function", "function": {"name": choice.name}}


def _append(messages: list[JsonObject], message: JsonObject) -> None:
    """Join consecutive texts of one role to one turn."""
    last = messages[-1] if messages else {}
    if message.keys() == last.keys() == {"role", "content"} and message["role"] == last["role"]:
        last["content"] = _joined([*_parts(last["content"]), *_parts(message["content"])])
    else:
        messages.append(message)


def _parts(content: JsonValue) -> list[JsonObject]:
    if isinstance(content, list):
        return cast(list[JsonObject], content)
    return [{"type": "text", "text": content}]


def _joined(parts: Sequence[JsonObject]) -> JsonValue:
    """Join texts that follow each other by a line break; return one string without images."""
    joined: list[JsonObject] = []
    for part in parts:
        if joined and joined[-1]["type"] == part["type"] == "text":
            joined[-1] = {"type": "text", "text": f"{joined[-1]['text']}\n{part['text']}"}
        else:
            joined.append(part)
    if len(joined) == 1 and joined[0]["type"] == "text":
        return joined[0]["text"]
    return cast(JsonValue, joined)


def _messages(turn: MessageTurn, where: str) -> Iterator[JsonObject]:
    """Yield a turn's tool results as messages of their own, before its text."""
    parts: list[JsonObject] = []
    calls: list[JsonValue] = []
    reasoning = ""
    has_results = False
    for number, block in enumerate([] if isinstance(turn.content, str) else turn.content):
        at = f"{where}[{number}]"
        match block.get("type"), turn.role:
            case "text", _:
                parts.append({"type": "text", "text": string_field(block, "text", at)})
            case "image", "user":
                parts.append(_image(block, at))
            case "tool_use", "assistant":
                calls.append(_call(block, at))
            case "tool_result", "user":
                has_results = True
                yield {
                    "role": "tool",
                    "tool_call_id": string_field(block, "tool_use_id", at),
                    "content": _result(block.get("content") or "", f"{at}.content"),
                }
            case "thinking", "assistant":
                reasoning += string_field(block, "thinking", at)
            case "redacted_thinking", "assistant":
                pass
            case kind, _:
                raise _unsupported(kind, at)
    content = turn.content if isinstance(turn.content, str) else _joined(parts) or ""
    if has_results and not content:
        return
    message: JsonObject = {"role": turn.role, "content": content}
    if calls:
        message["tool_calls"] = calls
    if reasoning:
        message["reasoning_content"] = reasoning
    yield message


def _result(content: JsonValue, where: str) -> JsonValue:
    """Return the text of a tool's result; with images, its parts. Raises ApiError (400)."""
    parts: list[JsonObject] = []
    for number, block in enumerate(content if isinstance(content, list) else ()):
        at = f"{where}[{number}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(block, dict) or kind not in ("text", "image"):
            raise _unsupported(kind, at)
        if kind == "image":
            parts.append(_image(block, at))
        else:
            parts.append({"type": "text", "text": string_field(block, "text", at)})
    return _joined(parts) if parts else _text(content, where)


def _call(block: Mapping[str, JsonValue], where: str) -> JsonValue:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise invalid("input must be the object from the answer", f"{where}.input")
    function: JsonValue = {
        "name": string_field(block, "name", where),
        "arguments": orjson.dumps(arguments).decode(),
    }
    return {"id": string_field(block, "id", where), "type": "function", "function": function}


def _image(block: Mapping[str, JsonValue], where: str) -> JsonObject:
    """Return the part of a chat for an image block. Raises ApiError (400)."""
    source = block.get("source")
    match source:
        case {"type": "base64", "media_type": str(kind), "data": str(data)}:
            url = f"data:{kind};base64,{data}"
        case {"type": "url", "url": str(url)}:
            pass
        case {"type": "file", "file_id": str(file_id)}:
            return {"type": "file", "file": {"file_id": file_id}}
        case _:
            raise invalid(
                "an image needs a source {'type': 'base64', 'media_type': 'image/png', 'data': …}",
                f"{where}.source",
            )
    return {"type": "image_url", "image_url": {"url": url}}


def _text(content: JsonValue | Sequence[JsonObject], where: str) -> str:
    return "\n".join(texts_of(cast(JsonValue, content), where, ("text",), _unsupported))


def _unsupported(kind: JsonValue, where: str) -> ApiError:
    return invalid(
        f"a block of type {str(kind)[:64]!r} is not supported here: text, image and "
        "tool_result in a user's turn, tool_use and thinking in the assistant's",
        where,
        "unsupported_content",
    )
