"""What the arms work with: a base, a library, a generator, and how replies are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from loraplex_generation.bundle import Bundle
from loraplex_generation.chat_base import ChatBase
from loraplex_generation.frozen_base import FrozenBase, LoraFA
from loraplex_generation.layout import AdapterLayout
from loraplex_generation.packing import ChatCodec, Row, pack
from loraplex_generation.scoring import TaskScore, score_groups
from loraplex_generation.sentences import SentenceEncoder
from loraplex_generation.service import Generator
from loraplex_generation.task_vectors import TaskVectors
from loraplex_generation.zoo.tasks import Example

__all__ = ["Bench"]

_TOKENS = 1024  # of rows in a forward


@dataclass(frozen=True, slots=True)
class Bench:
    base: FrozenBase
    codec: ChatCodec
    bundle: Bundle
    generator: Generator
    multi_task: Tensor | None = None  # [layout.size], told the task in its prompt

    @classmethod
    def load(
        cls,
        directory: Path,
        library: Path,
        encoder: SentenceEncoder,
        *,
        base_name: str,
        multi_task: Tensor | None = None,
    ) -> Bench:
        """Raises NotTrained and GeneratorMismatch as `Bundle.load` does."""
        base, codec = ChatBase.of_directory(directory)
        return cls.of(ChatBase(base, codec), library, encoder, base_name, multi_task)

    @classmethod
    def of(
        cls,
        chat: ChatBase,
        library: Path,
        encoder: SentenceEncoder,
        base_name: str,
        multi_task: Tensor | None = None,
    ) -> Bench:
        bundle = Bundle.load(library)
        generator = Generator(bundle, encoder, TaskVectors(lambda: chat), base_name)
        return cls(chat.base, chat.codec, bundle, generator, multi_task)

    @property
    def layout(self) -> AdapterLayout:
        return self.bundle.layout

    @property
    def n_experts(self) -> int:
        text_map = self.bundle.text_map
        return len(self.bundle.library.tasks if text_map is None else text_map.tasks)

    def experts(self, chosen: Tensor) -> Tensor:
        """float32 [n_chosen, layout.size]: adapters of trained tasks, of all that are known."""
        text_map = self.bundle.text_map
        if text_map is None:
            return self.bundle.library.means[chosen].float()
        return text_map.vector(text_map.points[chosen])

    def score(
        self,
        examples: Sequence[Example],
        vector: Tensor | None,
        instruction: str = "",
        earlier: Sequence[Example] = (),
    ) -> TaskScore:
        """Of greedy replies, in one teacher-forced forward for each part of the rows.

        What all prompts begin with (an instruction, earlier turns) is computed once for a part.
        """
        rows = [
            self.codec.row(example, instruction=instruction, earlier=earlier)
            for example in examples
        ]
        n_shared = min(_n_shared(rows), min(len(row.tokens) - row.n_answer for row in rows) - 1)
        head = (*self.codec.head, *rows[0].tokens[:n_shared])
        rows = [Row(row.tokens[n_shared:], row.n_answer) for row in rows]
        adapters = None
        if vector is not None:
            adapters = LoraFA(self.layout, vector[None], self.base.dtype)
        total = 0.0
        right: tuple[bool, ...] = ()
        for part in _parts(rows):
            score = score_groups(self.base, pack(head, [part]), adapters)[0]
            total += score.nll * sum(row.n_answer for row in part)
            right += score.right
        return TaskScore(total / sum(row.n_answer for row in rows), tuple(right))

    @torch.inference_mode()
    def loss(self, rows: Sequence[Row], vector: Tensor) -> float:
        """Mean NLL of the rows."""
        adapters = LoraFA(self.layout, vector[None], self.base.dtype)
        total = 0.0
        for part in _parts(rows):
            score = score_groups(self.base, pack(self.codec.head, [part]), adapters)[0]
            total += score.nll * sum(row.n_answer for row in part)
        return total / sum(row.n_answer for row in rows)


def _n_shared(rows: Sequence[Row]) -> int:
    """Tokens that all rows begin with."""
    columns = zip(*[row.tokens for row in rows], strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _parts(rows: Sequence[Row]) -> list[list[Row]]:
    parts: list[list[Row]] = [[]]
    for row in rows:
        if parts[-1] and sum(len(r.tokens) for r in parts[-1]) + len(row.tokens) > _TOKENS:
            parts.append([])
        parts[-1].append(row)
    return parts
