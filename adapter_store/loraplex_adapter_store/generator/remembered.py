"""Scores that are kept in a file, so that an evaluation of hours goes on where it was cut off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
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
        adapters = [None] * len(groups) if vectors is None else list(vectors)
        keys = [self._key(rows, v) for rows, v in zip(groups, adapters, strict=True)]
        new = list({key: i for i, key in enumerate(keys) if key not in self._known}.values())
        if new:
            asked = None if vectors is None else vectors[new]
            scores = self._scorer([groups[i] for i in new], asked)
            with self._path.open("a") as file:
                for i, score in zip(new, scores, strict=True):
                    self._known[keys[i]] = score
                    file.write(json.dumps([keys[i], score.nll, score.right]) + "\n")
        return [self._known[key] for key in keys]

    def _key(self, rows: Sequence[Row], vector: Tensor | None) -> str:
        tokens = [(row.tokens, row.n_answer) for row in rows]
        digest = hashlib.sha256(f"{self._kind} {tokens}".encode())
        if vector is not None:
            digest.update(vector.detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]
