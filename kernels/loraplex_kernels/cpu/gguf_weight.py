"""A weight in the blocks of a GGUF file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import BlockRows, pack_blocks, read_blocks, takes_blocks

_AT_ONCE = 16 << 20  # weights that are dequantised at the same time


class BlockType(NamedTuple):
    """A tensor type of GGUF whose values are in blocks."""

    name: str
    number: int
    n_values: int  # of a block or superblock
    n_bytes: int


# The types that are read. Others have two bits, or look up a table of hundreds of vectors.
BLOCK_TYPES: Mapping[int, BlockType] = MappingProxyType(
    {
        row.number: row
        for row in (
            BlockType("Q4_0", 2, 32, 18),
            BlockType("Q4_1", 3, 32, 20),
            BlockType("Q5_0", 6, 32, 22),
            BlockType("Q5_1", 7, 32, 24),
            BlockType("Q8_0", 8, 32, 34),
            BlockType("Q3_K", 11, 256, 110),
            BlockType("Q4_K", 12, 256, 144),
            BlockType("Q5_K", 13, 256, 176),
            BlockType("Q6_K", 14, 256, 210),
            BlockType("IQ4_NL", 20, 32, 18),
            BlockType("IQ4_XS", 23, 256, 136),
        )
    }
)


@dataclass(frozen=True, slots=True)
class GgufWeight:
    """W [n_out, in_features] in blocks along the inputs."""

    type: BlockType
    rows: Tensor  # uint8 [n_out, bytes of a row], on the CPU
    dtype: torch.dtype  # that W is rounded to

    @property
    def format(self) -> str:
        """The type's name in lower case, as "q4_k"."""
        return self.type.name.lower()

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[0], self.rows.shape[1] // self.type.n_bytes * self.type.n_values

    def dequantize(self) -> Tensor:
        """Return W, rounded once from gguf-py's float32."""
        at_once = max(1, _AT_ONCE // self.shape[1])
        weight = torch.empty(self.shape, dtype=self.dtype)
        for first in range(0, self.shape[0], at_once):
            part = slice(first, first + at_once)
            weight[part] = self._values(self.rows[part].contiguous())
        return weight

    def take(self, outputs: Tensor) -> Tensor:
        """Return rows ``outputs`` int64 [n] of W."""
        return replace(self, rows=self.rows[outputs]).dequantize()

    def _values(self, rows: Tensor) -> Tensor:
        """Return W in float32."""
        in_features = self.shape[1]
        if takes_blocks(self.type.number, in_features):
            packed = pack_blocks([BlockRows(self.type.number, rows)], in_features)
            return read_blocks(packed, in_features, torch.arange(rows.shape[0]))
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return torch.from_numpy(dequantize(rows.numpy(), GGMLQuantizationType(self.type.number)))
