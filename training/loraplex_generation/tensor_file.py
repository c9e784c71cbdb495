"""safetensors files with JSON metadata and a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

GROUP = 32
LEVELS = 7


class SafetensorsFile(NamedTuple):
    tensors: dict[str, Tensor]
    header: dict[str, Any]  # decoded JSON
    digest: str  # of the file's bytes


def read_tensor_file(path: Path) -> SafetensorsFile:
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["loraplex"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with path.open("rb") as raw:
        digest = hashlib.file_digest(raw, "sha256").hexdigest()[:16]
    return SafetensorsFile(tensors, header, digest)


def write_tensor_file(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, object]
) -> None:
    """Write the file beside ``path`` and rename it, so that readers see a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    text = json.dumps(header, sort_keys=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, partial, {"loraplex": text})
    partial.replace(path)


class GroupCodes(NamedTuple):
    """A matrix that is stored with four bits for each number.

    32 neighbours in a row share a float16 scale, and each number is its code, −7 to 7, times that
    scale. The errors are random, about a tenth of the numbers' spread, so they stay small in sums.
    """

    codes: Tensor  # uint8 [n_rows, ⌈size / GROUP⌉ · GROUP / 2]: two a byte, low half first
    scales: Tensor  # float16 [n_rows, ⌈size / GROUP⌉]

    def rows(self, size: int) -> Tensor:
        """Decode to float32 [n_rows, size]."""
        n = len(self.codes)
        codes = torch.stack([self.codes & 15, self.codes >> 4], -1).view(n, -1, GROUP)
        numbers = (codes.float() - LEVELS) * self.scales.float()[..., None]
        return numbers.view(n, -1)[:, :size]

    @classmethod
    def of(cls, rows: Tensor) -> GroupCodes:
        """Encode rows [n_rows, size]; the last group is filled with zeros."""
        n, size = rows.shape
        groups = pad(rows.float(), (0, -size % GROUP)).view(n, -1, GROUP)
        scales = (groups.abs().amax(-1) / LEVELS).half()
        steps = scales.float().clamp_min(torch.finfo(torch.float16).tiny)[..., None]
        codes = (groups / steps).round().clamp(-LEVELS, LEVELS).to(torch.int64) + LEVELS
        pairs = codes.view(n, -1, 2)
        return cls((pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8), scales)

    @classmethod
    def taken_from(cls, tensors: dict[str, Tensor], name: str) -> GroupCodes:
        """Remove the matrix `name` from the tensors of a file and return it."""
        return cls(*(tensors.pop(f"{name}.{field}") for field in cls._fields))
