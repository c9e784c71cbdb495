"""Translates bodies of OpenAI's Responses API into chats."""

from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from loraplex_server.api.protocol.body import JsonObject
from loraplex_server.api.protocol.chat import MAX_MESSAGES, ChatBody
from loraplex_server.api.protocol.generation import CallBody
from loraplex_server.api.protocol.responses import ResponsesBody
from loraplex_server.api.serving.content_blocks import string_field, texts_of
from loraplex_server.api.serving.unsupported import Rules, is_set, of_chat, refuse_unsupported
from loraplex_server.errors import ApiError, invalid

LOGPROBS = "message.output_text.logprobs"
_FUNCTION = {"name", "description", "parameters", "strict"}
_TEXTS = ("input_text", "output_text", "text")
_REFUSED: Rules = {
    **of_chat(ResponsesBody.model_fields),
    "stop": (is_set, "the Responses API has no stop strings"),
    "max_tokens": (is_set, "it is called max_output_tokens here"),
    "response_format": (is_set, "it is called text.format here"),
    "conversation": (is_set, "conversations are not supported; use previous_response_id"),
    "prompt": (is_set, "stored prompts are not supported; use instructions and input"),
    "context_management": (is_set, "the input is used unchanged"),
    "reasoning.summary": (is_set, "reasoning is part of the output and is not summarised"),
    "reasoning.generate_summary": (is_set, "reasoning is not summarised"),
}


def chat_of_response(body: ResponsesBody, messages: Sequence[JsonObject]) -> ChatBody:
    """Return the chat. ``messages`` exclude the instructions. Raises ApiError (400)."""
    refuse_unsupported(body.model_extra or {}, _REFUSED)
    reasoning = body.reasoning
    if reasoning is not None:
        extra = reasoning.model_extra or {}
        refuse_unsupported({f"reasoning.{name}": extra[name] for name in extra}, _REFUSED)
    for position, included in enumerate(body.include or ()):
        if included != LOGPROBS:
            raise invalid(
                f"include: {included[:64]!r} is not supported; only {LOGPROBS!r} is",
                f"include[{position}]",
                "unsupported_parameter",
            )
    n_most = MAX_MESSAGES - 1  # beside the instructions
    if len(messages) > n_most:
        raise invalid(f"the conversation has more than {n_most} messages", "input")
    with_logprobs = body.top_logprobs is not None or LOGPROBS in (body.include or ())
    choice = body.tool_choice
    first = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return ChatBody.model_validate(
        {
            **{name: getattr(body, name) for name in CallBody.model_fields},
            "messages": [*first, *messages],
            "max_completion_tokens": body.max_output_tokens,
            "logprobs": with_logprobs,
            "top_logprobs": body.top_logprobs,
            "tools": [
                {"type": "function", "function": tool.model_dump(include=_FUNCTION)}
                for tool in body.tools or ()
            ],
            "tool_choice": choice
            if choice is None or isinstance(choice, str)
            else {"type": "function", "function": {"name": choice.name}},
            "parallel_tool_calls": body.parallel_tool_calls,
            "reasoning_effort": reasoning and reasoning.effort,
        }
    )


def messages_of_input(items: str | Sequence[JsonObject]) -> list[JsonObject]:
    """Return the input as chat messages. Raises ApiError (400), which names the item."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[JsonObject] = []
    reasoning = ""  # belongs to the answer that follows
    for number, item in enumerate(items):
        where = f"input[{number}]"
        kind = item.get("type", "message")
        if kind == "message":
            message = _message(item, where)
        elif kind == "function_call":
            message = {"role": "assistant", "content": None, "tool_calls": [_call(item, where)]}
        elif kind == "function_call_output":
            message = {
                "role": "tool",
                "tool_call_id": string_field(item, "call_id", where),
                "content": _text(item.get("output"), f"{where}.output"),
            }
        elif kind == "reasoning":
            reasoning += _reasoning(item.get("content"))
            continue
        else:
            raise _unsupported(f"an item of type {str(kind)[:64]!r}", where)
        if message["role"] == "assistant" and reasoning:
            message["reasoning_content"], reasoning = reasoning, ""
        _append(messages, message)
    if not messages:
        raise invalid("the input has no message", "input")
    return messages


def _append(messages: list[JsonObject], message: JsonObject) -> None:
    """Join an answer and the calls that follow it to one turn."""
    calls = message.get("tool_calls")
    last = messages[-1] if messages else {}
    if calls and last.get("role") == "assistant":
        earlier = last.get("tool_calls")
        last["tool_calls"] = [
            *(earlier if isinstance(earlier, list) else []),
            *(calls if isinstance(calls, list) else []),
        ]
    else:
        messages.append(message)


def _message(item: Mapping[str, JsonValue], where: str) -> JsonObject:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise invalid(
            f"role is user, assistant, system or developer, not {str(role)[:64]!r}", f"{where}.role"
        )
    return {"role": role, "content": _content(item.get("content"), f"{where}.content")}


def _content(content: JsonValue, where: str) -> JsonValue:
    """Return the text of a message; with images, its parts."""
    blocks = content if isinstance(content, list) else []
    if not any(isinstance(block, dict) and block.get("type") == "input_image" for block in blocks):
        return _text(content, where)
    parts: list[JsonValue] = []
    for number, block in enumerate(blocks):
        at = f"{where}[{number}]"
        if isinstance(block, dict) and block.get("type") == "input_image":
            parts.append(_image(block, at))
        else:
            parts.append({"type": "text", "text": _text([block], at)})
    return parts


def _image(block: Mapping[str, JsonValue], where: str) -> JsonObject:
    """Return the part of a chat for an image: a URL, or an upload. Raises ApiError (400)."""
    named = [name for name in ("image_url", "file_id") if block.get(name) is not None]
    if len(named) != 1:
        raise invalid("an input_image needs either an image_url or a file_id", where)
    value = string_field(block, named[0], where)
    if named == ["file_id"]:
        return {"type": "file", "file": {"file_id": value}}
    return {"type": "image_url", "image_url": {"url": value}}


def _call(item: Mapping[str, JsonValue], where: str) -> JsonObject:
    function: JsonValue = {
        "name": string_field(item, "name", where),
        "arguments": string_field(item, "arguments", where),
    }
    return {"id": string_field(item, "call_id", where), "type": "function", "function": function}


def _text(content: JsonValue, where: str) -> str:
    return "".join(texts_of(content, where, _TEXTS, _unsupported_content))


def _reasoning(content: JsonValue) -> str:
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _unsupported_content(kind: JsonValue, where: str) -> ApiError:
    return _unsupported(f"content of type {str(kind)[:64]!r}", where)


def _unsupported(what: str, where: str) -> ApiError:
    return invalid(
        f"{what} is not supported: this server takes text, images and function calls",
        where,
        "unsupported_content",
    )
