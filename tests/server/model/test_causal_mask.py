"""A mask's window is read off the mask function; what is no causal window is refused."""

import pytest
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    sliding_window_causal_mask_function,
)

from loraplex_server.model.errors import UnsupportedBase
from loraplex_server.model.tracing.call_recorder import window_of


def test_a_causal_mask_has_no_window() -> None:
    assert window_of(causal_mask_function, 100) is None


@pytest.mark.parametrize("window", [1, 2, 16, 99])
def test_a_sliding_window_is_found(window: int) -> None:
    assert window_of(sliding_window_causal_mask_function(window), 100) == window


@pytest.mark.parametrize("window", [100, 4096])
def test_a_window_that_holds_the_whole_context_is_none(window: int) -> None:
    assert window_of(sliding_window_causal_mask_function(window), 100) is None


def _by_chunk(size: int) -> object:
    import torch

    overlay = chunked_overlay(size, torch.zeros(1, dtype=torch.int64))
    return and_masks(overlay, causal_mask_function)


@pytest.mark.parametrize("size", [8, 50, 64, 99])
def test_a_mask_by_chunk_is_refused(size: int) -> None:
    with pytest.raises(UnsupportedBase, match="by chunk"):
        window_of(_by_chunk(size), 100)  # type: ignore[arg-type]


def test_a_mask_by_chunk_that_holds_the_whole_context_is_causal() -> None:
    assert window_of(_by_chunk(100), 100) is None  # type: ignore[arg-type]


def test_a_bidirectional_mask_is_refused() -> None:
    with pytest.raises(UnsupportedBase, match="bidirectional"):
        window_of(bidirectional_mask_function, 100)


def test_a_mask_that_fails_is_refused_with_its_error() -> None:
    def fails(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        raise IndexError("no such block")

    with pytest.raises(UnsupportedBase, match="no such block"):
        window_of(fails, 100)
