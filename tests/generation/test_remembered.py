"""Kept scores: asked once, found again by a later process, never mixed up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from loraplex_generation.packing import Row
from loraplex_generation.remembered import Remembered
from loraplex_generation.scoring import TaskScore


class _Sums:
    """Scores a group by its tokens and its adapter, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, groups: Sequence[Sequence[Row]], vectors: Tensor | None) -> list[TaskScore]:
        self.asked.append(len(groups))
        bonus = torch.zeros(len(groups)) if vectors is None else vectors.sum(1)
        return [
            TaskScore(sum(map(sum, (row.tokens for row in rows))) + float(extra), (True,))
            for rows, extra in zip(groups, bonus, strict=True)
        ]


A, B = [Row((1, 2), 1)], [Row((3, 4), 1)]


def test_a_later_run_asks_only_for_what_is_new(tmp_path: Path) -> None:
    file, vectors = tmp_path / "scores", torch.tensor([[0.1], [0.2]])
    first = Remembered(_Sums(), file, "tiny")([A, B], vectors)
    sums = _Sums()
    again = Remembered(sums, file, "tiny")
    assert again([A, B], vectors) == first
    assert sums.asked == []
    longer = again([A, B, B], torch.cat([vectors, torch.tensor([[0.3]])]))
    assert longer[:2] == first
    assert longer[2].nll > first[1].nll
    assert sums.asked == [1]


def test_the_base_other_adapters_and_other_kinds_are_told_apart(tmp_path: Path) -> None:
    sums = _Sums()
    keep = Remembered(sums, tmp_path / "scores", "tiny")
    keep([A], None)
    keep([A], torch.zeros(1, 1))
    keep([A], torch.ones(1, 1))
    Remembered(sums, tmp_path / "scores", "small")([A], None)
    assert sums.asked == [1, 1, 1, 1]


def test_the_same_question_twice_in_one_call_is_asked_once(tmp_path: Path) -> None:
    sums = _Sums()
    scores = Remembered(sums, tmp_path / "scores", "tiny")([A, A, B], None)
    assert scores[0] == scores[1] != scores[2]
    assert sums.asked == [2]
