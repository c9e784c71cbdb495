"""Bodies of OpenAI's Responses API as chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from loraplex_server.api.errors import ApiError, invalid
from loraplex_server.api.protocol.body import JsonObject
from loraplex_server.api.protocol.chat import MAX_MESSAGES, ChatBody
from loraplex_server.api.protocol.generation import CallBody
from loraplex_server.api.protocol.responses import ResponsesBody

from .unsupported import Rules, given, of_chat, refuse_unsupported

__all__ = ["chat_of_response", "messages_of_input"]

LOGPROBS = "message.output_text.logprobs"
_FUNCTION = {"name", "description", "parameters", "strict"}
_TEXTS = ("input_text", "output_text", "text")
_REFUSED: Rules = {
    **of_chat(ResponsesBody.model_fields),
    "stop": (given, "the Responses API has no stop strings"),
    "max_tokens": (given, "it is called max_output_tokens here"),
    "response_format": (given, "it is called text.format here"),
    "conversation": (given, "there are no conversations; use previous_response_id"),
    "prompt": (given, "there are no stored prompts; use instructions and input"),
    "context_management": (given, "the input is taken as it is"),
    "reasoning.summary": (given, "thoughts are items of the output as they are, not summed up"),
    "reasoning.generate_summary": (given, "thoughts are not summed up"),
}


def chat_of_response(body: ResponsesBody, messages: Sequence[JsonObject]) -> ChatBody:
    """``messages``: all but the instructions. Raises ApiError (400)."""
    refuse_unsupported(body.model_extra or {}, _REFUSED)
    reasoning = body.reasoning
    if reasoning is not None:
        told = {f"reasoning.{name}": value for name, value in (reasoning.model_extra or {}).items()}
        refuse_unsupported(told, _REFUSED)
    for position, wanted in enumerate(body.include or ()):
        if wanted != LOGPROBS:
            raise invalid(
                f"include: {wanted[:64]!r} is not supported; only {LOGPROBS!r} is",
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
                {
                    "type": "function",
                    "function": tool.model_dump(include=_FUNCTION),
                }
                for tool in body.tools or ()
            ],
            "tool_choice": choice
            if choice is None or isinstance(choice, str)
            else {"type": "function", "function": {"name": choice.name}},
            "parallel_tool_calls": body.parallel_tool_calls,
            "reasoning_effort": reasoning and reasoning.effort,
        }
    )


def messages_of_input(given: str | Sequence[JsonObject]) -> list[JsonObject]:
    """Raises ApiError (400), which names the item."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[JsonObject] = []
    thought = ""  # goes to the answer that follows
    for number, item in enumerate(given):
        where = f"input[{number}]"
        kind = item.get("type", "message")
        if kind == "message":
            message = _message(item, where)
        elif kind == "function_call":
            message = {"role": "assistant", "content": None, "tool_calls": [_call(item, where)]}
        elif kind == "function_call_output":
            message = {
                "role": "tool",
                "tool_call_id": _string(item, "call_id", where),
                "content": _text(item.get("output"), f"{where}.output"),
            }
        elif kind == "reasoning":
            thought += _thought(item.get("content"))
            continue
        else:
            raise _unsupported(f"an item of type {str(kind)[:64]!r}", where)
        if message["role"] == "assistant" and thought:
            message["reasoning_content"], thought = thought, ""
        _append(messages, message)
    if not messages:
        raise invalid("the input has no message", "input")
    return messages


def _append(messages: list[JsonObject], message: JsonObject) -> None:
    """The calls that follow an answer, and one another, are one turn."""
    calls = message.get("tool_calls")
    last = messages[-1] if messages else {}
    if calls and last.get("role") == "assistant":
        before = last.get("tool_calls")
        last["tool_calls"] = [
            *(before if isinstance(before, list) else []),
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
    return {"role": role, "content": _text(item.get("content"), f"{where}.content")}


def _call(item: Mapping[str, JsonValue], where: str) -> JsonObject:
    function: JsonValue = {
        "name": _string(item, "name", where),
        "arguments": _string(item, "arguments", where),
    }
    return {"id": _string(item, "call_id", where), "type": "function", "function": function}


def _text(content: JsonValue, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid("a text or a list of text parts is needed", where)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind not in _TEXTS:
            raise _unsupported(f"content of type {str(kind)[:64]!r}", f"{where}[{number}]")
        texts.append(_string(part, "text", f"{where}[{number}]"))
    return "".join(texts)


def _thought(content: JsonValue) -> str:
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _string(item: Mapping[str, JsonValue], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise invalid(f"a string {name!r} is needed", f"{where}.{name}")
    return value


def _unsupported(what: str, where: str) -> ApiError:
    return invalid(
        f"{what} is not supported: this server takes text and function calls",
        where,
        "unsupported_content",
    )
