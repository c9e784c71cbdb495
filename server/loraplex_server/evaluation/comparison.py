"""Answers of a server with several adapters to one set of chats, and what they score."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from loraplex_training.errors import ExamplesError
from loraplex_training.examples import Chat, Message, chat_of, json_lines

from .metrics import Mean, Metric, mean_of

BASE = "base"
_AT_ONCE = 8  # requests


@dataclass(frozen=True, slots=True)
class Row:
    chat: Chat  # up to the expected answer
    expected: str


@dataclass(frozen=True, slots=True)
class Arm:
    """What one adapter answers to each row."""

    name: str
    answers: Sequence[str]
    scores: Sequence[float]
    mean: Mean
    gain: Mean | None = None  # over the first arm, row by row; None: it is the first

    @property
    def verdict(self) -> str:
        if self.gain is None:
            return ""
        if self.gain.low > 0:
            return "better"
        return "worse" if self.gain.high < 0 else "no clear difference"


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """Read lines of ``{"messages": […]}``, the last one the expected answer, or of pairs.

    A pair is ``{"prompt": …, "answer": …}``. Raises ExamplesError, which names the line.
    """
    return [_row(record, where) for where, record in islice(json_lines(path), limit)]


def compare(
    ask: Callable[[dict[str, object]], dict[str, Any]],
    names: Sequence[str],
    rows: Sequence[Row],
    metric: Metric,
) -> list[Arm]:
    """Return what each adapter answers, and scores, greedily.

    ``ask`` sends the body of a chat and returns the answer's; several threads call it. ``names``:
    adapters, or ``base``.
    """

    def answer(name: str, row: Row) -> str:
        adapter = {} if name == BASE else {"adapter": name}
        reply = ask({"temperature": 0, **row.chat.to_json(), **adapter})
        message = reply["choices"][0]["message"]
        return message["content"] or json.dumps(message.get("tool_calls") or "")

    arms: list[Arm] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for name in names:
            answers = list(pool.map(lambda row, name=name: answer(name, row), rows))
            pairs = zip(answers, rows, strict=True)
            scores = [metric(text.strip(), row.expected.strip()) for text, row in pairs]
            gain = None
            if arms:
                gain = mean_of([s - b for s, b in zip(scores, arms[0].scores, strict=True)])
            arms.append(Arm(name, answers, scores, mean_of(scores), gain))
    return arms


def _row(record: object, where: str) -> Row:
    if isinstance(record, dict) and "messages" not in record:
        texts = record.get("prompt"), record.get("answer")
        if not all(isinstance(text, str) for text in texts):
            raise ExamplesError(
                f'{where} is neither {{"messages": […]}} nor {{"prompt": "…", "answer": "…"}}'
            )
        chat = Chat([Message(role="user", content=str(texts[0]))])
        return Row(chat, str(texts[1]))
    chat = chat_of(record, where)
    last = chat.messages[-1]
    if last["role"] != "assistant":
        raise ExamplesError(f"{where} ends with a message of {last['role']}, not with an answer")
    return Row(Chat(chat.messages[:-1], chat.tools), last["content"])
