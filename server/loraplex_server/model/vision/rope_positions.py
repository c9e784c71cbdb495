"""Positions of tokens in three axes (M-RoPE of Qwen-VL): time, height and width.

A text's tokens count one by one in all axes. An image's tokens count its rows and columns, and the
text behind it begins after the larger of the two.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .prompt_image import PromptImage


class RopePositions(NamedTuple):
    """The positions of a prompt's tokens and of those that follow."""

    prompt: NDArray[np.int64]  # [3, n_tokens]
    shift: int  # position of a later token, less its index

    def of(self, start: int, n_tokens: int) -> NDArray[np.int64]:
        """Return the positions [3, n_tokens] of the tokens from ``start`` on."""
        end = start + n_tokens
        later = np.arange(max(start, self.prompt.shape[1]), end) + self.shift
        return np.concatenate([self.prompt[:, start:end], np.tile(later, (3, 1))], axis=1)


def rope_positions(n_tokens: int, images: Sequence[PromptImage], n_virtual: int) -> RopePositions:
    """Return the positions of a prompt with ``n_virtual`` tokens of a prefix at its start.

    ``images``: those of the prompt, in order, each with its grid of tokens.
    """
    prompt = np.zeros((3, n_tokens), dtype=np.int64)
    done, shift = 0, 0  # tokens with a position, and position less index of the next one
    for image in images:
        assert image.grid is not None
        n_rows, n_columns = image.grid
        first, end = n_virtual + image.positions[0], n_virtual + image.positions[-1] + 1
        prompt[:, done:first] = np.arange(done, first) + shift
        row, column = np.divmod(np.arange(end - first), n_columns)
        prompt[:, first:end] = np.stack([0 * row, row, column]) + first + shift
        done, shift = end, shift + max(n_rows, n_columns) - (end - first)
    prompt[:, done:] = np.arange(done, n_tokens) + shift
    return RopePositions(prompt, shift)
