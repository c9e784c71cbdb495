"""Packed plans on disk: ``packed/ab/<digest>``, a cache beside the contents.

    [16 bytes xxh3 of the rest][u64 head length][u64 data length][head][data]
    head: [a header, as in ``plan_file``][the plan without its factors]

The data are the tensors of the packed adapter, each at a multiple of 64 bytes; the header says
where, the packer's key, and the hash of the plan that was packed: the same adapter has other plans
on another base. Head and data are read into memory apart, so that the plan outlives a packed
adapter that went to the device. A file that is missing, damaged, of another packer or of another
plan is no error: the plan is prepared anew.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from .digest_folder import DigestFolder
from .disk import Disk
from .name_record import Content
from .plan import AdapterPlan
from .plan_file import aligned, pack_header, pack_plan, parse_header, parse_plan
from .report import JsonValue

__all__ = ["PackedFiles", "Packer"]

_CHECKSUM_BYTES = 16
_FRONT_BYTES = _CHECKSUM_BYTES + 16


class Packer(Protocol):
    """Makes what the host tier keeps of a plan. Any thread, several at a time."""

    @property
    def key(self) -> str:
        """Another one whenever ``prepare`` would make something else of the same plan."""

    def check(self, plan: AdapterPlan) -> None:
        """Raises AdapterRefused if ``plan`` cannot be served. Reads names and shapes, no values."""

    def prepare(self, plan: AdapterPlan) -> AdapterPlan:
        """The plan with a ``packed_adapter`` instead of factors. Raises AdapterRefused."""

    def dump(self, packed: object) -> tuple[JsonValue, Sequence[Tensor]]:
        """A packed adapter as a header and contiguous host tensors."""

    def restore(self, header: JsonValue, tensors: Sequence[Tensor]) -> object:
        """The packed adapter that ``dump`` saw; it may keep the tensors."""


class PackedFiles:
    """The callers serialise ``publish`` and ``remove`` of one digest.

    Without a packer nothing is read, but what is there is still removed.
    """

    def __init__(self, root: Path, disk: Disk, packer: Packer | None) -> None:
        self._disk = disk
        self._packed = DigestFolder(root / "packed", disk)
        self._staging = root / "staging"
        self._packer = packer

    def read(self, content: Content) -> AdapterPlan | None:
        """The prepared plan, or None: then prepare it. Mostly outside the interpreter lock."""
        if self._packer is None:
            return None
        parts = _read(self._packed.path(content.digest))
        if parts is None:
            return None
        head, data = parts
        text, plan_at = parse_header(head)
        # Files of earlier versions do not say which plan they are of.
        if text["key"] != self._packer.key or text.get("plan_sha256") != content.plan_sha256:
            return None
        tensors = [
            data[start : start + n_bytes].view(getattr(torch, dtype)).view(shape)
            for dtype, shape, start, n_bytes in text["tensors"]
        ]
        packed = self._packer.restore(text["layout"], tensors)
        return replace(parse_plan(head[plan_at:]), packed_adapter=packed)

    def stage(self, plan: AdapterPlan, plan_sha256: str) -> Path:
        """Writes a prepared plan where nobody sees it yet. Raises OSError; then nothing is left.

        ``plan_sha256``: of the plan that it was prepared from.
        """
        assert self._packer is not None
        layout, tensors = self._packer.dump(plan.packed_adapter)
        header: dict[str, JsonValue] = {
            "key": self._packer.key,
            "plan_sha256": plan_sha256,
            "layout": layout,
        }
        chunks = _chunks(header, replace(plan, packed_adapter=None), tensors)
        path = self._staging / uuid.uuid4().hex
        try:
            self._disk.write(path, chunks, flush=False)  # a torn file shows by its checksum
        except OSError:
            self.discard(path)
            raise
        return path

    def publish(self, staged: Path, digest: str) -> None:
        path = self._packed.path(digest)
        self._disk.make_directory(path.parent)
        self._disk.replace(staged, path)

    def discard(self, staged: Path) -> None:
        self._disk.unlink(staged)

    def remove(self, digest: str) -> int:
        """Returns the bytes freed; 0 if there is none."""
        return self._disk.unlink(self._packed.path(digest))

    def n_bytes(self, digest: str) -> int:
        """0 if there is none."""
        try:
            return self._packed.path(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def digests(self) -> Iterator[str]:
        return self._packed.digests()


def _chunks(
    header: Mapping[str, JsonValue], plan: AdapterPlan, tensors: Sequence[Tensor]
) -> list[bytes | memoryview]:
    places: list[JsonValue] = []
    data: list[bytes | memoryview] = []
    at = 0
    for tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        places.append([dtype, list(tensor.shape), at, tensor.nbytes])
        if tensor.numel():
            padding = bytes(aligned(tensor.nbytes) - tensor.nbytes)
            data += [tensor.reshape(-1).view(torch.uint8).numpy().data, padding]
        at += aligned(tensor.nbytes)
    head = pack_header({**header, "tensors": places}) + b"".join(pack_plan(plan).chunks)
    lengths = len(head).to_bytes(8, "little") + at.to_bytes(8, "little")
    checksum = xxhash.xxh3_128(lengths)
    for chunk in (head, *data):
        checksum.update(chunk)
    return [checksum.digest() + lengths + head, *data]


def _read(path: Path) -> tuple[Tensor, Tensor] | None:
    """(head, data) as bytes, if they are there and whole."""
    try:
        with path.open("rb") as file:
            n_bytes = path.stat().st_size
            front = file.read(_FRONT_BYTES)
            lengths = front[_CHECKSUM_BYTES:]
            n_head, n_data = (int.from_bytes(lengths[i : i + 8], "little") for i in (0, 8))
            if n_bytes != _FRONT_BYTES + n_head + n_data:
                return None
            parts = [torch.empty(n, dtype=torch.uint8) for n in (n_head, n_data)]
            checksum = xxhash.xxh3_128(lengths)
            for part in parts:
                if file.readinto(part.numpy().data) != len(part):
                    return None
                checksum.update(part.numpy().data)
    except OSError:
        return None
    return (parts[0], parts[1]) if checksum.digest() == front[:_CHECKSUM_BYTES] else None
