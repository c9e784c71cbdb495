"""Packed plans on disk: ``packed/ab/<digest>``, a cache beside the contents.

    [16 bytes xxh3 of the rest][u64 head length][u64 data length][head][data]
    head: [a header, as in ``plan_file``][the plan without its factors]

The data are the tensors of the packed form, each at a multiple of 64 bytes. The header has their
positions, the packer's key, and the hash of the packed plan: an adapter has another plan on another
base. Head and data are separate in memory, so that the plan outlives a form that moved to the
device. A file that is missing, damaged, or of another packer or plan is not an error: the plan is
prepared again.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from loraplex_adapter_store.names.name_record import Content
from loraplex_adapter_store.plan import AdapterPlan, PackedForm
from loraplex_adapter_store.report import JsonValue

from .content_files import DigestFolder, Disk
from .plan_file import aligned, pack_header, pack_plan, parse_header, parse_plan

_CHECKSUM_BYTES = 16
_FRONT_BYTES = _CHECKSUM_BYTES + 16


class Packer(Protocol):
    """Makes the form of a plan that the host tier keeps. Any thread, several at a time."""

    @property
    def key(self) -> str:
        """Changes whenever ``prepare`` would make another form of the same plan."""

    def check(self, plan: AdapterPlan) -> None:
        """Raises AdapterRefused if ``plan`` cannot be served. Reads names and shapes, no values."""

    def prepare(self, plan: AdapterPlan) -> AdapterPlan:
        """Return the plan with a ``packed_adapter`` instead of factors. Raises AdapterRefused."""

    def restore(self, header: JsonValue, tensors: Sequence[Tensor]) -> PackedForm:
        """Return the form of which ``dump`` returned these values. It may keep the tensors."""


class PackedFiles:
    """The callers serialise ``publish`` and ``remove`` of one digest.

    Without a packer nothing is read, but existing files are still removed.
    """

    def __init__(self, root: Path, disk: Disk, packer: Packer | None) -> None:
        self._disk = disk
        self._packed = DigestFolder(root / "packed", disk)
        self._staging = root / "staging"
        self._packer = packer

    def read(self, content: Content) -> AdapterPlan | None:
        """Return the prepared plan, or None if it must be prepared again."""
        if self._packer is None:
            return None
        parts = read_packed(self._packed.path(content.digest))
        if parts is None:
            return None
        head, data = parts
        text, plan_at = parse_header(head)
        if (text["key"], text.get("plan_sha256")) != (self._packer.key, content.plan_sha256):
            return None
        tensors = [
            data[start : start + n_bytes].view(getattr(torch, dtype)).view(shape)
            for dtype, shape, start, n_bytes in text["tensors"]
        ]
        packed = self._packer.restore(text["layout"], tensors)
        return replace(parse_plan(head[plan_at:]), packed_adapter=packed)

    def stage(self, plan: AdapterPlan, plan_sha256: str) -> Path:
        """Write a prepared plan to the staging folder. Raises OSError and leaves no files.

        ``plan_sha256``: the hash of the plan before it was prepared.
        """
        assert self._packer is not None
        assert plan.packed_adapter is not None
        layout, tensors = plan.packed_adapter.dump()
        header: dict[str, JsonValue] = {
            "key": self._packer.key,
            "plan_sha256": plan_sha256,
            "layout": layout,
        }
        chunks = _chunks(header, replace(plan, packed_adapter=None), tensors)
        path = self._staging / uuid.uuid4().hex
        try:
            self._disk.write(path, chunks, flush=False)  # the checksum reveals a torn file
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
        """Return the freed bytes; 0 if there is no file."""
        return self._disk.unlink(self._packed.path(digest))

    def n_bytes(self, digest: str) -> int:
        """Return the size of the file; 0 if there is none."""
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


def read_packed(path: Path) -> tuple[Tensor, Tensor] | None:
    """Return (head, data) as bytes; None if the file is missing or damaged."""
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
