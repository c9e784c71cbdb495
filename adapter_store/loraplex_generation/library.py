"""The library: experts that passed the quality gate, in one file, and the subspace they span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import NotTrained
from .experts import Expert
from .layout import AdapterLayout
from .tensor_file import read_tensor_file, write_tensor_file

__all__ = ["LIBRARY_FILE", "Library", "Subspace", "export_library"]

LIBRARY_FILE = "library.safetensors"
_LEAST_SHARE = 1e-4  # of the variance: directions below are rounding


@dataclass(frozen=True, slots=True)
class Library:
    """Immutable. `means` stays in bfloat16: it is the bulk of the file and of the memory."""

    layout: AdapterLayout
    base_fingerprint: str
    tasks: tuple[str, ...]
    means: Tensor  # bfloat16 [n_tasks, layout.size]
    snapshots: Tensor  # float32 [n_tasks, n_snapshots, subspace.size]: the last steps
    cards: tuple[Mapping[str, Any], ...]  # of each task
    dropped: tuple[Mapping[str, Any], ...]  # tasks that the gate refused
    missing: tuple[str, ...]  # tasks of the training set not trained on their own yet
    digest: str

    @classmethod
    def load(cls, path: Path) -> Library:
        """Raises NotTrained if there is no such file."""
        if not path.is_file():
            raise NotTrained(f"no library {path.name!r}; run `loraplex zoo train`")
        tensors, header, digest = read_tensor_file(path)
        return cls(
            layout=AdapterLayout.from_dict(header["layout"]),
            base_fingerprint=header["base"],
            tasks=tuple(header["tasks"]),
            means=tensors["means"],
            snapshots=tensors["snapshots"].float(),
            cards=tuple(header["cards"]),
            dropped=tuple(header["dropped"]),
            missing=tuple(header["missing"]),
            digest=digest,
        )

    def combine(self, weights: Tensor) -> Tensor:
        """Σ weights[n] · expert n: float32 [size], or [k, size] for weights [k, n_tasks]."""
        return weights.float() @ self.means.float()

    def subspace(self) -> Subspace:
        return Subspace.of(self.means.float())


@dataclass(frozen=True, slots=True)
class Subspace:
    """Principal directions of the experts, written as combinations of them.

    A point t [size] stands for mean + t · directions, and the directions are `mix` times the
    centred experts; so every point is a weighting of the experts and no basis need be stored.
    """

    mix: Tensor  # float32 [size, n_tasks]
    directions: Tensor  # float32 [size, layout.size], orthonormal
    mean: Tensor  # float32 [layout.size]

    @classmethod
    def of(cls, means: Tensor) -> Subspace:
        """Of experts [n_tasks, layout.size]."""
        mean = means.mean(0)
        centred = means - mean
        mix = _principal(centred @ centred.T)
        return cls(mix, mix @ centred, mean)

    @classmethod
    def of_points(cls, points: Tensor, rows: Tensor) -> Subspace:
        """Of experts points [n_tasks, n_rows] · rows [n_rows, size], which are not written out."""
        mean = points.mean(0)
        centred = points - mean
        mix = _principal(centred @ (rows @ rows.T) @ centred.T)
        return cls(mix, (mix @ centred) @ rows, mean @ rows)

    @property
    def size(self) -> int:
        return len(self.mix)

    def project(self, vectors: Tensor) -> Tensor:
        """[…, layout.size] → t […, size]; what lies outside the subspace is dropped."""
        return (vectors - self.mean) @ self.directions.T

    def weights(self, t: Tensor) -> Tensor:
        """t […, size] → weights of the experts […, n_tasks] that give mean + t · directions."""
        n = self.mix.shape[1]
        mixed = t @ self.mix
        return mixed - mixed.mean(-1, keepdim=True) + 1 / n


def _principal(gram: Tensor) -> Tensor:
    """[size, n]: combinations of n centred vectors that are orthonormal, the longest axis first."""
    values, vectors = torch.linalg.eigh(gram.double())
    keep = values > _LEAST_SHARE * values.sum()
    values, vectors = values[keep].flip(0), vectors[:, keep].flip(1)
    mix: Tensor = (vectors / values.sqrt()).T.float()
    return mix


def export_library(
    path: Path,
    layout: AdapterLayout,
    base_fingerprint: str,
    experts: Sequence[Expert],
    missing: Sequence[str],
) -> None:
    """Writes those that pass the gate, and lists the others in the header."""
    kept = [e for e in experts if e.card.passes]
    if not kept:
        raise NotTrained("no expert has passed the gate yet, so there is nothing to export")
    means = torch.stack([e.mean for e in kept]).bfloat16()
    subspace = Subspace.of(means.float())
    n = max(len(e.snapshots) for e in kept)
    snapshots = torch.stack([subspace.project(_repeat(e.snapshots, n)) for e in kept])
    write_tensor_file(
        path,
        {"means": means, "snapshots": snapshots},
        {
            "format": "loraplex-library-1",
            "layout": layout.to_dict(),
            "base": base_fingerprint,
            "tasks": [e.card.task for e in kept],
            "cards": [e.card.to_dict() for e in kept],
            "dropped": [e.card.to_dict() for e in experts if not e.card.passes],
            "missing": list(missing),
        },
    )


def _repeat(snapshots: Tensor, n: int) -> Tensor:
    """[n, size]: an expert with fewer snapshots shows its last one again."""
    return torch.cat([snapshots, snapshots[-1:].expand(n - len(snapshots), -1)])
