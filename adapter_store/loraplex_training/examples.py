"""Read chat examples and mark the tokens that the assistant has to learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from .errors import ExamplesError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "Message", "read_jsonl", "tokenise"]

_ROLES = ("system", "user", "assistant", "tool")


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One chat as tokens; ``learn[i]`` says that token i was written by the assistant."""

    tokens: tuple[int, ...]
    learn: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def read_jsonl(path: Path) -> list[list[Message]]:
    """The chats of a JSONL file, one ``{"messages": [{"role", "content"}, …]}`` a line.

    Raises ExamplesError, which names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ExamplesError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExamplesError(f"{path} is not UTF-8: {error}") from error
    chats = [_chat(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not chats:
        raise ExamplesError(f"{path} holds no examples")
    return chats


def tokenise(
    chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, max_len: int, where: str
) -> Example:
    """Render ``chat`` with the tokenizer's chat template, exactly as a server will.

    What the assistant wrote, its end-of-turn token included, is to be learnt; everything else is
    context. Raises ExamplesError if the chat is longer than ``max_len`` tokens, or if the template
    rewrites earlier turns, so that what is learnt would not be what is served.
    """
    text, spans = _render(chat, tokenizer, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if len(tokens) > max_len:
        raise ExamplesError(
            f"{where} has {len(tokens)} tokens, more than {max_len}; shorten it or raise --max-len"
        )
    learn = tuple(any(a <= start and end <= b for a, b in spans) for start, end in offsets)
    return Example(tuple(tokens), learn)


def _render(
    chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The text up to the last assistant turn, and the spans of characters to learn."""

    def render(messages: Sequence[Message], *, reply: bool = False) -> str:
        rendered = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=reply
        )
        assert isinstance(rendered, str)
        return rendered

    spans: list[tuple[int, int]] = []
    text = earlier = ""
    for i, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        prompt = render(chat[:i], reply=True)
        text = render(chat[: i + 1]).rstrip()  # generation ends at the end-of-turn token
        if not (text.startswith(prompt) and prompt.startswith(earlier)):
            raise ExamplesError(f"{where}: the chat template rewrites earlier turns")
        spans.append((len(prompt), len(text)))
        earlier = text
    return text, spans


def _chat(line: str, where: str) -> list[Message]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ExamplesError(f"{where} is not JSON: {error}") from error
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
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
    return [Message(role=m["role"], content=m["content"]) for m in messages]
