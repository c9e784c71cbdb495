"""Chat examples: reading, and marking of the tokens that the assistant has to learn."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from .errors import ExamplesError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("system", "user", "assistant", "tool")


class Message(TypedDict):
    role: str
    content: str


Tool = Mapping[str, object]  # {"type": "function", "function": {…}}


class Chat(NamedTuple):
    messages: Sequence[Message]
    tools: Sequence[Tool] = ()  # declared in the system turn

    def to_json(self) -> dict[str, object]:
        """Return the chat as a line of the data; ``tools`` only if there are any."""
        tools = {"tools": list(self.tools)} if self.tools else {}
        return {**tools, "messages": list(self.messages)}


@dataclass(frozen=True, slots=True)
class Example:
    """A chat as tokens; ``learn[i]`` is True if the assistant wrote token i."""

    tokens: tuple[int, ...]
    learn: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def read_jsonl(path: Path) -> list[Chat]:
    """Read a JSONL file of ``{"messages": [{"role", "content"}, …], "tools": […]}``.

    ``tools`` may be absent.

    Raises ExamplesError, which names the line.
    """
    return [chat_of(record, where) for where, record in json_lines(path)]


def json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the values of a file of JSON lines, each after its place for messages.

    Raises ExamplesError, which names the line, also for a file without lines.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ExamplesError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExamplesError(f"{path} is not UTF-8: {error}") from error
    if not any(map(str.strip, lines)):
        raise ExamplesError(f"{path} holds no examples")
    for i, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path}:{i}", _parsed(line, f"{path}:{i}")


def chat_of(record: object, where: str) -> Chat:
    """Return the chat of a parsed line. Raises ExamplesError, which says ``where``."""
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
    learns: Collection[int] | None = None,
    or_else: str = "",
) -> Example:
    """Render ``chat`` as a server does, and tokenise it.

    ``chat_template`` None means the tokenizer's. The assistant's text and its end-of-turn tokens
    are learnt, or only those of the messages ``learns``; the rest is context. Raises ExamplesError
    for a chat of more than ``max_len`` tokens, and for a template that rewrites earlier turns. The
    error of the first says what helps: to shorten it, ``or_else``.
    """
    text, turns = _render(chat, tokenizer, chat_template, where)
    spans = [span for i, span in turns.items() if learns is None or i in learns]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if len(tokens) > max_len:
        raise ExamplesError(
            f"{where} has {len(tokens)} tokens, more than {max_len}; shorten it{or_else}"
        )
    learn = tuple(any(a <= start and end <= b for a, b in spans) for start, end in offsets)
    return Example(tuple(tokens), learn)


def held_out(
    lengths: Sequence[int], share: float, *, max_tokens: int | None = None, seed: int = 0
) -> set[int]:
    """Return the indices of the examples to hold out: ``share`` of them, spread over all.

    With ``max_tokens``, those of them that fit, drawn by ``seed``. At least one is held out. Raises
    ExamplesError if none is left to train on.
    """
    n = max(1, round(len(lengths) * share))
    if n >= len(lengths):
        raise ExamplesError(f"{len(lengths)} examples are too few to hold out {n} for validation")
    every = len(lengths) / n
    chosen = [int(i * every) for i in range(n)]
    if max_tokens is not None:
        random.Random(seed).shuffle(chosen)
        totals = accumulate(lengths[i] for i in chosen)
        chosen = chosen[: max(1, sum(total <= max_tokens for total in totals))]
    return set(chosen)


def _render(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, where: str
) -> tuple[str, dict[int, tuple[int, int]]]:
    """Return the text up to the last assistant turn, and the characters of the assistant's turns.

    The keys are the numbers of the messages.
    """

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

    spans: dict[int, tuple[int, int]] = {}
    text = earlier = ""
    for i, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        prompt = render(chat.messages[:i], reply=True)
        text = render(chat.messages[: i + 1]).rstrip()  # generation ends at the end-of-turn token
        if not (text.startswith(prompt) and prompt.startswith(earlier)):
            raise ExamplesError(f"{where}: the chat template rewrites earlier turns")
        spans[i] = len(prompt), len(text)
        earlier = text
    return text, spans


def _parsed(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ExamplesError(f"{where} is not JSON: {error}") from error
