"""Messages between the processes of an engine: JSON, and tensors behind it, over a socket.

[u64 length][JSON, spaces up to a multiple of 64][tensors, each at a multiple of 64]
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Channel", "ChannelClosed", "Frame"]

_ALIGN = 64


class ChannelClosed(Exception):
    """The process at the other end is gone."""


class Frame(NamedTuple):
    kind: str
    fields: Mapping[str, Any]  # JSON
    tensors: Sequence[Tensor]  # on the host, views of one buffer


class Channel:
    """One end. At each end one thread sends and one receives at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, kind: str, fields: Mapping[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        """Blocks while the other end does not read. Raises ChannelClosed."""
        described = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
        text = json.dumps({"kind": kind, "fields": fields, "tensors": described}).encode()
        text = text.ljust(_aligned(8 + len(text)) - 8)
        pieces: list[bytes | memoryview] = [len(text).to_bytes(8, "little") + text]
        for tensor in tensors:
            if tensor.numel():
                pieces.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                pieces.append(bytes(_aligned(tensor.nbytes) - tensor.nbytes))
        try:
            for piece in pieces:  # all are there: no error of ours stops half a frame
                self._end.sendall(piece)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self) -> Frame:
        """Waits for the next. Raises ChannelClosed."""
        length = int.from_bytes(self._read(8).numpy().tobytes(), "little")
        head = json.loads(self._read(length).numpy().tobytes())
        shapes = [(getattr(torch, dtype), shape) for dtype, shape in head["tensors"]]
        sizes = [torch.Size(shape).numel() * dtype.itemsize for dtype, shape in shapes]
        data = self._read(sum(map(_aligned, sizes)))
        tensors, at = [], 0
        for (dtype, shape), n_bytes in zip(shapes, sizes, strict=True):
            tensors.append(data[at : at + n_bytes].view(dtype).view(shape))
            at += _aligned(n_bytes)
        return Frame(head["kind"], head["fields"], tensors)

    def wake(self) -> None:
        """Nothing passes any more: who waits at either end gets ChannelClosed. Any thread."""
        with contextlib.suppress(OSError):  # the other end was first
            self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Once nobody uses this end."""
        self.wake()
        self._end.close()

    def _read(self, n_bytes: int) -> Tensor:
        buffer = torch.empty(n_bytes, dtype=torch.uint8)
        view = buffer.numpy().data
        at = 0
        while at < n_bytes:
            try:
                n_read = self._end.recv_into(view[at:])
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if n_read == 0:
                raise ChannelClosed("the other process is gone")
            at += n_read
        return buffer


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGN) * _ALIGN
