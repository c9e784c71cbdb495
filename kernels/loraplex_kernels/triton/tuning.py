"""Tile choices, read from ``tuning.json``: which shapes a launch uses for which problem.

A row is keyed by (kernel, capability, dtype, rank, width, rows): the largest rank, the width
(columns read by shrink, written by expand) and the number of pairs for which it was chosen. The
row used is the first whose every bound holds; a capability between two takes the lower one. No
choice changes a bit of the result (see ``arithmetic``), so a table may be re-tuned freely.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

import torch

__all__ = [
    "KERNELS",
    "ExpandChoice",
    "FusedChoice",
    "ShrinkChoice",
    "TuningKey",
    "TuningRow",
    "TuningTable",
    "default_table",
    "tile_rows",
]

Kernel = Literal["shrink", "expand", "fused"]
KERNELS: tuple[Kernel, ...] = ("shrink", "expand", "fused")

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class ShrinkChoice:
    serial: bool  # one program adds the chunks of a tile; else one program for each chunk
    rank_programs: int  # programs that share the pages of a tile
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class ExpandChoice:
    block_m: int  # at most this many rows of a tile to a program
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class FusedChoice:
    """``enabled`` is false where two launches are faster than reading A once for each tile."""

    enabled: bool
    block_n: int
    num_warps: int
    num_stages: int


Choice = ShrinkChoice | ExpandChoice | FusedChoice

_CHOICES: dict[Kernel, type[ShrinkChoice] | type[ExpandChoice] | type[FusedChoice]] = {
    "shrink": ShrinkChoice,
    "expand": ExpandChoice,
    "fused": FusedChoice,
}


@dataclass(frozen=True, slots=True)
class TuningKey:
    kernel: Kernel
    capability: int  # 80, 90, …
    dtype: str  # bf16, fp16, fp32
    rank: int
    width: int
    rows: int


@dataclass(frozen=True, slots=True)
class TuningRow:
    key: TuningKey
    choice: Choice

    def to_json(self) -> dict[str, int | str | bool]:
        return {**asdict(self.key), **asdict(self.choice)}


def tile_rows(n_pairs: int) -> int:
    """Pairs of a tile, for a whole step: its segments serve every target. Changes no result."""
    return 16 if n_pairs <= 256 else 32 if n_pairs <= 1024 else 64


class TuningTable:
    """Immutable rows, searched by bound."""

    def __init__(self, rows: Iterable[TuningRow]) -> None:
        self.rows = tuple(rows)
        self._groups: dict[tuple[Kernel, int, str], list[TuningRow]] = {}
        for row in self.rows:
            key = (row.key.kernel, row.key.capability, row.key.dtype)
            self._groups.setdefault(key, []).append(row)
        for group in self._groups.values():
            group.sort(key=lambda row: (row.key.rows, row.key.rank, row.key.width))

    @classmethod
    def read(cls, text: str) -> TuningTable:
        return cls(_row_of(record) for record in json.loads(text)["rows"])

    @classmethod
    def load(cls, path: Path) -> TuningTable:
        return cls.read(path.read_text(encoding="utf-8"))

    def dump(self) -> str:
        """JSON with one row a line, so that a re-tuning reads well as a diff."""
        lines = ",\n".join("    " + json.dumps(row.to_json()) for row in self.rows)
        return f'{{\n  "rows": [\n{lines}\n  ]\n}}\n'

    def shrink(self, key: TuningKey) -> ShrinkChoice:
        choice = self._find(key)
        assert isinstance(choice, ShrinkChoice)
        return choice

    def expand(self, key: TuningKey) -> ExpandChoice:
        choice = self._find(key)
        assert isinstance(choice, ExpandChoice)
        return choice

    def fused(self, key: TuningKey) -> FusedChoice:
        choice = self._find(key)
        assert isinstance(choice, FusedChoice)
        return choice

    def _find(self, key: TuningKey) -> Choice:
        known = sorted({c for kernel, c, _ in self._groups if kernel == key.kernel})
        if not known:
            raise KeyError(f"no tuning row for kernel {key.kernel!r}")
        capability = max((c for c in known if c <= key.capability), default=known[0])
        group = self._groups.get((key.kernel, capability, key.dtype), [])
        for row in group:
            bounds = (row.key.rows, row.key.rank, row.key.width)
            if all(a <= b for a, b in zip((key.rows, key.rank, key.width), bounds, strict=True)):
                return row.choice
        if not group:
            raise KeyError(f"no tuning row for {key.kernel} {capability} {key.dtype}")
        return group[-1].choice


def key_for(
    kernel: Kernel, dtype: torch.dtype, *, capability: int, rank: int, width: int, rows: int
) -> TuningKey:
    """The key of a problem. Raises ValueError for a dtype that no kernel computes in."""
    if dtype not in _DTYPES:
        raise ValueError(f"no kernel for {dtype}; known: {', '.join(map(str, _DTYPES))}")
    return TuningKey(kernel, capability, _DTYPES[dtype], rank, width, rows)


@cache
def default_table() -> TuningTable:
    """The table in the package. Read once; an immutable value."""
    return TuningTable.read(
        resources.files(__package__).joinpath("tuning.json").read_text(encoding="utf-8")
    )


def _row_of(record: dict[str, int | str | bool]) -> TuningRow:
    fields = dict(record)
    key = TuningKey(**{name: fields.pop(name) for name in TuningKey.__dataclass_fields__})  # type: ignore[arg-type]
    return TuningRow(key, _CHOICES[key.kernel](**fields))  # type: ignore[arg-type]
