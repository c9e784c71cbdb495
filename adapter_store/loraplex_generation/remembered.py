"""Scores kept in a file, so that an interrupted evaluation resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from .packing import Row
from .scoring import Scorer, TaskScore

__all__ = ["Remembered"]


class Remembered:
    """A ``Scorer`` that asks another for what `path` does not hold yet.

    A score is found again by the tokens of its rows and the bits of its adapter.
    """

    def __init__(self, scorer: Scorer, path: Path, kind: str) -> None:
        """`kind` names the base and the way of scoring: scores of different kinds do not mix."""
        self._scorer, self._path, self._kind = scorer, path, kind
        self._known: dict[str, TaskScore] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                key, nll, right = json.loads(line)
                self._known[key] = TaskScore(nll, tuple(right))

    def __call__(self, groups: Sequence[Sequence[Row]], vectors: Tensor | None) -> list[TaskScore]:
        def score(new: list[int]) -> list[TaskScore]:
            asked = None if vectors is None else vectors[new]
            return self._scorer([groups[i] for i in new], asked)

        adapters = [None] * len(groups) if vectors is None else list(vectors)
        keys = [self._key(self._kind, r, v) for r, v in zip(groups, adapters, strict=True)]
        return self._recall(keys, score)

    def arrow(self, groups: Sequence[Sequence[Row]], experts: Tensor) -> list[TaskScore]:
        keys = [self._key(f"{self._kind} arrow", rows, experts) for rows in groups]
        return self._recall(keys, lambda new: self._scorer.arrow([groups[i] for i in new], experts))

    def _recall(
        self, keys: Sequence[str], score: Callable[[list[int]], list[TaskScore]]
    ) -> list[TaskScore]:
        new = list({key: i for i, key in enumerate(keys) if key not in self._known}.values())
        if new:
            with self._path.open("a") as file:
                for i, found in zip(new, score(new), strict=True):
                    self._known[keys[i]] = found
                    file.write(json.dumps([keys[i], found.nll, found.right]) + "\n")
        return [self._known[key] for key in keys]

    @staticmethod
    def _key(kind: str, rows: Sequence[Row], adapter: Tensor | None) -> str:
        tokens = [(row.tokens, row.n_answer) for row in rows]
        digest = hashlib.sha256(f"{kind} {tokens}".encode())
        if adapter is not None:
            digest.update(adapter.detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]
