"""An image of a prompt, ready for the tower."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

_KEY_BYTES = 8


@dataclass(frozen=True, slots=True, eq=False)
class PromptImage:
    """The inputs of the tower for one image, and the tokens whose place its embeddings take."""

    digest: bytes  # of the file
    inputs: Mapping[str, Tensor]  # by the names of the image processor
    positions: tuple[int, ...]  # of the placeholders in the prompt, ascending
    # Rows and columns of its tokens, if positions follow them (M-RoPE).
    grid: tuple[int, int] | None = None


def prefix_key_ids(prompt_ids: Sequence[int], images: Sequence[PromptImage]) -> list[int]:
    """Return the prompt's ids with numbers of 63 bits of each image in place of placeholders.

    Keys of KV pages are made of these: all placeholders have the same id, whatever the image is.
    """
    ids = list(prompt_ids)
    for image in images:
        n_bytes = _KEY_BYTES * len(image.positions)
        stream = hashlib.shake_256(image.digest).digest(n_bytes)
        for index, position in enumerate(image.positions):
            at = index * _KEY_BYTES
            bits = int.from_bytes(stream[at : at + _KEY_BYTES], "little") >> 1
            ids[position] = -1 - bits  # no token has a negative id
    return ids
