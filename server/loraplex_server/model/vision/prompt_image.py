"""An image of a prompt, ready for the tower."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

_KEY_BYTES = 8


class Block(NamedTuple):
    """Tokens that see one another, by their positions."""

    first: int
    end: int  # position behind the last token
    # True if the sliding windows of layers hide tokens from one another that are far apart.
    has_windows: bool


@dataclass(frozen=True, slots=True, eq=False)
class PromptImage:
    """The inputs of the tower for one image, and the tokens whose place its embeddings take."""

    digest: bytes  # of the file
    inputs: Mapping[str, Tensor]  # by the names of the image processor
    positions: tuple[int, ...]  # of the placeholders in the prompt, ascending
    # Rows and columns of its tokens, if positions follow them (M-RoPE).
    grid: tuple[int, int] | None = None
    # The image's tokens, or all of the prompt; None: every token sees those before it alone.
    block: Block | None = None


def blocks_of(images: Sequence[PromptImage]) -> list[Block]:
    """Return the blocks of the prompt's images, ascending."""
    return sorted({image.block for image in images if image.block is not None})


def prefix_key_ids(prompt_ids: Sequence[int], images: Sequence[PromptImage]) -> list[int]:
    """Return the prompt's ids with numbers of 63 bits of each image in place of placeholders.

    Keys of KV pages are made of these: all placeholders have the same id, whatever the image is.
    Keys within a block depend on all of the block, as its keys and values do.
    """
    ids = list(prompt_ids)
    for image in images:
        for position, key in zip(
            image.positions, _keys(image.digest, len(image.positions)), strict=True
        ):
            ids[position] = key
    for first, end, _ in blocks_of(images):
        content = b"".join(id.to_bytes(_KEY_BYTES, "little", signed=True) for id in ids[first:end])
        ids[first:end] = _keys(content, end - first)
    return ids


def _keys(content: bytes, n: int) -> list[int]:
    """Return ``n`` negative numbers, as no token has, that depend on all of the content."""
    stream = hashlib.shake_256(content).digest(_KEY_BYTES * n)
    starts = range(0, len(stream), _KEY_BYTES)
    return [-1 - (int.from_bytes(stream[at : at + _KEY_BYTES], "little") >> 1) for at in starts]
