"""Messages between the processes of an engine: JSON and tensors over a socket.

[u64 length][JSON, spaces up to a multiple of 64][tensors, each at a multiple of 64]
"""

import contextlib
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraplex_adapter_store.contents.plan_file import aligned, pack_header


class ChannelClosed(Exception):
    """The other process is gone."""


class Frame(NamedTuple):
    kind: str
    fields: Mapping[str, Any]  # JSON
    tensors: Sequence[Tensor]  # on the host, views of one buffer


class Channel:
    """An end of a connection, at which one thread sends and one receives."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, kind: str, fields: Mapping[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        """Sends a frame. Blocks while the other end does not read. Raises ChannelClosed."""
        shapes = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
        head = pack_header({"kind": kind, "fields": fields, "tensors": shapes})
        pieces: list[bytes | memoryview] = [head]
        for tensor in tensors:
            if tensor.numel():
                pieces.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                pieces.append(bytes(aligned(tensor.nbytes) - tensor.nbytes))
        try:
            for piece in pieces:  # complete before sending: no error cuts a frame in half
                self._end.sendall(piece)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self) -> Frame:
        """Wait for the next frame. Raises ChannelClosed."""
        length = int.from_bytes(self._read(8).numpy().tobytes(), "little")
        head = json.loads(self._read(length).numpy().tobytes())
        shapes = [(getattr(torch, dtype), shape) for dtype, shape in head["tensors"]]
        sizes = [torch.Size(shape).numel() * dtype.itemsize for dtype, shape in shapes]
        data = self._read(sum(map(aligned, sizes)))
        tensors, at = [], 0
        for (dtype, shape), n_bytes in zip(shapes, sizes, strict=True):
            tensors.append(data[at : at + n_bytes].view(dtype).view(shape))
            at += aligned(n_bytes)
        return Frame(head["kind"], head["fields"], tensors)

    def wake(self) -> None:
        """Makes waiting threads at both ends raise ChannelClosed. Any thread."""
        with contextlib.suppress(OSError):  # the other end has closed it
            self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes this end, which no thread uses any more."""
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
