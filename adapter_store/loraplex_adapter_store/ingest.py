"""Adds an adapter: staged to disk, checked, folded, packed; not visible to requests yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

from .adapter_config import AdapterConfig
from .base_spec import BaseSpec
from .content_files import CHAT_TEMPLATE_FILE, CONFIG_FILE, PLAN_FILE, WEIGHTS_FILE, ContentFiles
from .errors import LimitExceeded
from .limits import StoreLimits
from .plan_file import pack_plan
from .reader import Reading, read_adapter
from .safetensors_reader import SafetensorsFile

__all__ = ["AdapterFiles", "Ingested", "chunks_of", "ingest"]

_CHUNK = 1 << 20


class AdapterFiles(NamedTuple):
    """What makes an adapter: config text, safetensors bytes, and what lies beside them."""

    config: bytes
    weights: Iterable[bytes]
    chat_template: str | None
    companions: Mapping[str, bytes] = MappingProxyType({})  # see ``companion_files``


class Ingested(NamedTuple):
    staged: Path
    reading: Reading
    plan_sha256: str
    n_bytes: int  # of the staged files


def chunks_of(weights: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: weights.read(_CHUNK), b"")


@contextmanager
def ingest(
    adapter: AdapterFiles,
    files: ContentFiles,
    base: BaseSpec,
    limits: StoreLimits,
    *,
    tenant: str = "",
) -> Iterator[Ingested]:
    """Complete when entered; what was not published is discarded on leaving.

    The bytes are copied before they are looked at: nobody can change them under the checks. Raises
    AdapterRefused.
    """
    config = AdapterConfig.parse(adapter.config, limits)
    staged = files.stage()
    try:
        files.write(staged / CONFIG_FILE, [adapter.config])
        files.write(staged / WEIGHTS_FILE, _bounded(adapter.weights, limits.max_file_bytes))
        if adapter.chat_template is not None:
            files.write(staged / CHAT_TEMPLATE_FILE, [adapter.chat_template.encode()])
        with SafetensorsFile(staged / WEIGHTS_FILE, limits) as tensors:
            reading = read_adapter(
                config,
                tensors,
                base,
                limits,
                chat_template=adapter.chat_template,
                companions=adapter.companions,
                tenant=tenant,
            )
        packed = pack_plan(reading.plan)
        files.write(staged / PLAN_FILE, packed.chunks)
        yield Ingested(staged, reading, packed.sha256, files.n_bytes(staged))
    finally:
        files.discard(staged)


def _bounded(chunks: Iterable[bytes], limit: int) -> Iterator[bytes]:
    n_bytes = 0
    for chunk in chunks:
        n_bytes += len(chunk)
        if n_bytes > limit:
            raise LimitExceeded(f"the weights exceed {limit} bytes")
        yield chunk
