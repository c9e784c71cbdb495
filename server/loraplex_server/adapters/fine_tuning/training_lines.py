"""Parses the lines of training files, in OpenAI's two formats.

supervised  {"messages": […], "tools": […]}; "weight": 0 in a message of the assistant skips it
dpo         {"input": {"messages": […], "tools": […]}, "preferred_output": [message],
             "non_preferred_output": [message]}

Imports little, since a worker process checks uploaded files.
"""

import json
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

from loraplex_training.examples import Chat, Message

Method = Literal["supervised", "dpo"]
_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
_SUPERVISED = {"messages", "tools", "parallel_tool_calls"}
_DPO = {"input", "preferred_output", "non_preferred_output"}


class TrainingLine(NamedTuple):
    """A line of a training file."""

    chats: tuple[Chat, ...]  # one for supervised; the preferred and the other one for dpo
    learns: frozenset[int]  # numbers of the messages to learn, in each chat

    @property
    def method(self) -> Method:
        return "supervised" if len(self.chats) == 1 else "dpo"


def parse_line(value: object) -> TrainingLine:
    """Return the line of a parsed JSON value. Raises ValueError, which says what is wrong."""
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    if _DPO & value.keys():
        return _preference(value)
    _only(value, _SUPERVISED, "a line")
    messages, tools = _messages(value.get("messages"), "messages"), _tools(value)
    learns = frozenset(
        i
        for i, message in enumerate(value["messages"])
        if message["role"] == "assistant" and _weight(message, f"messages[{i}]")
    )
    if not learns:
        raise ValueError(
            "messages has no message of the assistant with a weight above 0: nothing to learn"
        )
    return TrainingLine((Chat(messages, tools),), learns)


def _preference(value: dict[str, object]) -> TrainingLine:
    _only(value, _DPO, "a line of preferences")
    given = value.get("input")
    if not isinstance(given, dict):
        raise ValueError('"input" must be an object with "messages"')
    _only(given, _SUPERVISED, "input")
    messages, tools = _messages(given.get("messages"), "input.messages"), _tools(given)
    chats = []
    for name in ("preferred_output", "non_preferred_output"):
        output = _messages(value.get(name), name)
        if [message["role"] for message in output] != ["assistant"]:
            raise ValueError(f"{name} must be a list of one message of the assistant")
        chats.append(Chat([*messages, *output], tools))
    if chats[0] == chats[1]:
        raise ValueError("preferred_output and non_preferred_output are equal: nothing to learn")
    return TrainingLine(tuple(chats), frozenset({len(messages)}))


def _messages(value: object, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'"{where}" must be a list of messages')
    return [_message(message, f"{where}[{i}]") for i, message in enumerate(value)]


def _message(value: object, where: str) -> Message:
    """Return a message as chat templates read it."""
    role = value.get("role") if isinstance(value, dict) else None
    if not isinstance(value, dict) or role not in _ROLES:
        raise ValueError(f"{where}.role must be one of {', '.join(_ROLES)}, not {str(role)[:64]!r}")
    _only(value, {"role", "content", "name", "weight", "tool_calls", "tool_call_id"}, where)
    message = {key: value[key] for key in ("name", "tool_call_id") if key in value}
    calls = value.get("tool_calls")
    if calls is not None:
        if role != "assistant" or not isinstance(calls, list):
            raise ValueError(f"{where}.tool_calls must be a list, in messages of the assistant")
        message["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    content = value.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"{where}.content must be a text")
    return cast("Message", {"role": _ROLES[role], "content": content, **message})


def _call(value: object, where: str) -> dict[str, object]:
    """Return a call with its arguments as an object, as chat templates expect them."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}.function needs a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}.function.arguments is not JSON: {error}") from error
    return {"type": "function", "function": {**function, "arguments": arguments or {}}}


def _tools(value: dict[str, object]) -> Sequence[dict[str, object]]:
    tools = value.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError('"tools" must be a list of {"type": "function", "function": …}')
    return tools


def _weight(message: dict[str, object], where: str) -> bool:
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"{where}.weight must be 0 or 1, not {str(weight)[:64]}")
    return weight != 0


def _only(value: dict[str, object], known: set[str], where: str) -> None:
    if unknown := sorted(value.keys() - known):
        raise ValueError(
            f"{where} has the unknown field {unknown[0][:64]!r}; known: {sorted(known)}"
        )
