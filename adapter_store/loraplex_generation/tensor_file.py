"""safetensors files with JSON metadata and an identity, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["SafetensorsFile", "read_tensor_file", "write_tensor_file"]


class SafetensorsFile(NamedTuple):
    tensors: dict[str, Tensor]
    header: dict[str, Any]  # decoded JSON
    digest: str  # of the file's bytes


def read_tensor_file(path: Path) -> SafetensorsFile:
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["loraplex"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with path.open("rb") as raw:
        digest = hashlib.file_digest(raw, "sha256").hexdigest()[:16]
    return SafetensorsFile(tensors, header, digest)


def write_tensor_file(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, object]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    text = json.dumps(header, sort_keys=True, ensure_ascii=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, partial, {"loraplex": text})
    partial.replace(path)
