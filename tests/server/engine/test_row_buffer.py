"""Rows that are kept from step to step."""

from __future__ import annotations

import torch

from loraplex_server.engine.row_buffer import RowBuffer


def test_rows_share_memory_up_to_the_capacity_and_are_fresh_beyond() -> None:
    buffer = RowBuffer(4, 3, torch.float32, torch.device("cpu"))
    address = buffer.rows(2).data_ptr()
    assert buffer.rows(4).shape == (4, 3)
    assert buffer.rows(4).data_ptr() == address
    assert buffer.rows(9).shape == (9, 3)
    assert buffer.rows(9).data_ptr() != address
    assert buffer.rows(4).data_ptr() == address
