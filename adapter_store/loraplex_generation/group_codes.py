"""A matrix as four bits a number: how large ones are shipped, in a quarter of bfloat16's size.

Groups of 32 neighbours share a float16 scale; a code is a whole number from −7 to 7. The error is
some tenth of the numbers' spread and as good as random, so it stays small in sums over many of
them: in adapters made of directions, and in what a reader's layers and the guard make of a vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["GROUP", "GroupCodes"]

GROUP = 32
_LEVELS = 7


class GroupCodes(NamedTuple):
    codes: (
        Tensor  # uint8 [n_rows, ⌈size / GROUP⌉ · GROUP / 2]: two a byte, the first in the low half
    )
    scales: Tensor  # float16 [n_rows, ⌈size / GROUP⌉]

    @classmethod
    def of(cls, rows: Tensor) -> GroupCodes:
        """Of rows [n_rows, size]; a last group that is not full ends in zeros."""
        n, size = rows.shape
        groups = F.pad(rows.float(), (0, -size % GROUP)).view(n, -1, GROUP)
        scales = (groups.abs().amax(-1) / _LEVELS).half()
        steps = scales.float().clamp_min(torch.finfo(torch.float16).tiny)[..., None]
        codes = (groups / steps).round().clamp(-_LEVELS, _LEVELS).to(torch.int64) + _LEVELS
        pairs = codes.view(n, -1, 2)
        return cls((pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8), scales)

    def rows(self, size: int) -> Tensor:
        """float32 [n_rows, size]."""
        n = len(self.codes)
        codes = torch.stack([self.codes & 15, self.codes >> 4], -1).view(n, -1, GROUP)
        numbers = (codes.float() - _LEVELS) * self.scales.float()[..., None]
        return numbers.view(n, -1)[:, :size]
