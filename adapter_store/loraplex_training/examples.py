"""Read chat examples and mark the tokens that the assistant has to learn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from .errors import ExamplesError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Chat", "Example", "Message", "Tool", "chat_of", "read_jsonl", "tokenise"]

_ROLES = ("system", "user", "assistant", "tool")


class Message(TypedDict):
    role: str
    content: str


Tool = Mapping[str, object]  # {"type": "function", "function": {…}}


class Chat(NamedTuple):
    messages: Sequence[Message]
    tools: Sequence[Tool] = ()  # what the system turn declares

    def to_json(self) -> dict[str, object]:
        """A line of the data; ``tools`` only where there are some."""
        tools = {"tools": list(self.tools)} if self.tools else {}
        return {**tools, "messages": list(self.messages)}


@dataclass(frozen=True, slots=True)
class Example:
    """One chat as tokens; ``learn[i]`` says that token i was written by the assistant."""

    tokens: tuple[int, ...]
    learn: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def read_jsonl(path: Path) -> list[Chat]:
    """The chats of a JSONL file, one ``{"messages": [{"role", "content"}, …], "tools": […]}`` a
    line; ``tools`` may be absent.

    Raises ExamplesError, which names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ExamplesError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExamplesError(f"{path} is not UTF-8: {error}") from error
    chats = [_read(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not chats:
        raise ExamplesError(f"{path} holds no examples")
    return chats


def chat_of(record: object, where: str) -> Chat:
    """A line of the data, parsed. Raises ExamplesError, which says ``where``."""
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(messages, list) or not messages:
        raise ExamplesError(f'{where} has no "messages" list')
    for message in messages:
        if (
            not isinstance(message, dict)
            or message.get("role") not in _ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise ExamplesError(
                f'{where}: a message is {{"role": one of {"|".join(_ROLES)}, "content": text}}'
            )
    if all(message["role"] != "assistant" for message in messages):
        raise ExamplesError(f"{where} has no assistant message, so nothing to learn")
    tools = record.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ExamplesError(f'{where}: "tools" is a list of {{"type": "function", "function": …}}')
    return Chat([Message(role=m["role"], content=m["content"]) for m in messages], tools)


def tokenise(
    chat: Chat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_len: int,
    where: str,
    chat_template: str | None = None,
) -> Example:
    """Render ``chat`` with ``chat_template`` (None: the tokenizer's), exactly as a server will.

    What the assistant wrote, its end-of-turn token included, is to be learnt; everything else is
    context. Raises ExamplesError if the chat is longer than ``max_len`` tokens, or if the template
    rewrites earlier turns, so that what is learnt would not be what is served.
    """
    text, spans = _render(chat, tokenizer, chat_template, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if len(tokens) > max_len:
        raise ExamplesError(
            f"{where} has {len(tokens)} tokens, more than {max_len}; shorten it or raise --max-len"
        )
    learn = tuple(any(a <= start and end <= b for a, b in spans) for start, end in offsets)
    return Example(tuple(tokens), learn)


def _render(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The text up to the last assistant turn, and the spans of characters to learn."""

    def render(messages: Sequence[Message], *, reply: bool = False) -> str:
        rendered = tokenizer.apply_chat_template(
            list(messages),
            tools=list(chat.tools) or None,
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=reply,
        )
        assert isinstance(rendered, str)
        return rendered

    spans: list[tuple[int, int]] = []
    text = earlier = ""
    for i, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        prompt = render(chat.messages[:i], reply=True)
        text = render(chat.messages[: i + 1]).rstrip()  # generation ends at the end-of-turn token
        if not (text.startswith(prompt) and prompt.startswith(earlier)):
            raise ExamplesError(f"{where}: the chat template rewrites earlier turns")
        spans.append((len(prompt), len(text)))
        earlier = text
    return text, spans


def _read(line: str, where: str) -> Chat:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ExamplesError(f"{where} is not JSON: {error}") from error
    return chat_of(record, where)
