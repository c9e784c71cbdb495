"""Rows of one adapter packed behind one shared prompt head.

Every chat begins with the same system turn. With an adapter on, its keys and values depend on the
adapter, not on the row; so the rows of an adapter share one copy and the rest is laid end to end:

    [ head | row 1 | row 2 | … ]      a row sees the head and itself, positions go on from the head
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from loraplex_generation.zoo.tasks import Example

from .row_attention import RowPlan

__all__ = [
    "TOKENS_AT_ONCE",
    "ChatCodec",
    "PackedBatch",
    "PromptTokenizer",
    "Row",
    "in_parts",
    "pack",
]

_MARKER = "\u2402"  # stands for a text in a template
TOKENS_AT_ONCE = 256  # of rows: a layer of it takes a core some milliseconds


class PromptTokenizer(Protocol):
    """What we need of a transformers tokenizer with a chat template."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens of one example behind the head; the last `n_answer` are predicted."""

    tokens: tuple[int, ...]
    n_answer: int


@dataclass(frozen=True, slots=True)
class PackedBatch:
    tokens: Tensor  # int64 [n_adapters, length]
    positions: Tensor  # int64 [n_adapters, length]
    plan: RowPlan  # which tokens are a row: it sees the head and itself
    source: Tensor  # int64 [n_targets]: flat positions whose next token is an answer token
    target: Tensor  # int64 [n_targets]
    row: Tensor  # int64 [n_targets]: running index of the example
    adapter: Tensor  # int64 [n_rows]: the adapter of each example


class ChatCodec:
    """Text to rows. Head, turn ends and stop token come from the model's chat template."""

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARKER}], tokenize=False, add_generation_prompt=True
        )
        reply = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARKER}, {"role": "assistant", "content": _MARKER}],
            tokenize=False,
            add_generation_prompt=False,
        )
        before, self._after = text.split(_MARKER)
        end = reply.removeprefix(text).removeprefix(_MARKER).strip()
        self._tokenizer = tokenizer
        self.head = tuple(self._ids(before))
        self._end = self._ids(end)[:1]
        self._tail = self._ids(self._after)

    def row(
        self, example: Example, *, instruction: str = "", earlier: Sequence[Example] = ()
    ) -> Row:
        """`instruction` goes before the first prompt, on a line of its own.

        `earlier`: turns of the same chat, which were answered before this prompt came.
        """
        tokens: list[int] = []
        for turn in earlier:
            tokens += self._ids(_led(turn.prompt, instruction)) + self._tail
            tokens += self._ids(turn.answer + self._between)
            instruction = ""
        answer = self._ids(example.answer) + self._end
        tokens += self._ids(_led(example.prompt, instruction)) + self._tail + answer
        return Row(tuple(tokens), len(answer))

    def prompt(self, text: str) -> Row:
        """A row without an answer; its last token is the last of the prompt."""
        return Row(tuple(self._ids(text) + self._tail), 0)

    @property
    def end(self) -> int:
        """The token that ends a reply."""
        return self._end[0]

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens))

    @cached_property
    def _between(self) -> str:
        """What stands between an answer and the next prompt."""
        chat = [{"role": role, "content": _MARKER} for role in ("user", "assistant", "user")]
        text = self._tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=False
        )
        return text.split(_MARKER)[2]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _led(prompt: str, instruction: str) -> str:
    return f"{instruction}\n{prompt}" if instruction else prompt


def pack(head: Sequence[int], groups: Sequence[Sequence[Row]]) -> PackedBatch:
    """One group of rows per adapter; shorter groups are padded at the end."""
    lengths = [len(head) + sum(len(row.tokens) for row in rows) for rows in groups]
    length = max(lengths)
    tokens = torch.zeros(len(groups), length, dtype=torch.int64)
    positions = torch.zeros_like(tokens)
    source: list[int] = []
    target: list[int] = []
    rows_of: list[int] = []
    adapter: list[int] = []
    for g, rows in enumerate(groups):
        at = len(head)
        tokens[g, :at] = torch.tensor(head)
        positions[g, :at] = torch.arange(at)
        for row in rows:
            n = len(row.tokens)
            tokens[g, at : at + n] = torch.tensor(row.tokens)
            positions[g, at : at + n] = torch.arange(len(head), len(head) + n)
            first = at + n - row.n_answer
            source += range(g * length + first - 1, g * length + at + n - 1)
            target += row.tokens[n - row.n_answer :]
            rows_of += [len(adapter)] * row.n_answer
            adapter.append(g)
            at += n
    as_tensor = torch.tensor
    return PackedBatch(
        tokens,
        positions,
        RowPlan.of(len(head), [[len(row.tokens) for row in rows] for rows in groups], length),
        as_tensor(source, dtype=torch.int64),
        as_tensor(target, dtype=torch.int64),
        as_tensor(rows_of, dtype=torch.int64),
        as_tensor(adapter, dtype=torch.int64),
    )


def in_parts(rows: Sequence[Row], n_tokens: int) -> list[list[Row]]:
    """In order, each part of at most so many tokens, or of one longer row."""
    parts: list[list[Row]] = []
    left = 0
    for row in rows:
        if len(row.tokens) > left:
            parts.append([])
            left = max(n_tokens, len(row.tokens))
        parts[-1].append(row)
        left -= len(row.tokens)
    return parts
