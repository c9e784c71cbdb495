"""Multipart uploads of an adapter: named parts only, sizes bounded while they stream in."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from loraplex_server.api.errors import ApiError, invalid

__all__ = ["Upload", "receive_upload"]

_MAX_TEXT = 1 << 20  # bytes of each part but the weights
# accepted names of a part → what it is
_PARTS = {
    "config": "config",
    "adapter_config.json": "config",
    "weights": "weights",
    "adapter_model.safetensors": "weights",
    "chat_template": "chat_template",
    "chat_template.jinja": "chat_template",
    "description": "description",
    "examples": "examples",
}


@dataclass(frozen=True, slots=True)
class Upload:
    config: bytes
    weights: Path  # a temporary file, gone when the upload is left
    chat_template: str | None
    description: str | None
    examples: tuple[str, ...]


@asynccontextmanager
async def receive_upload(request: Request) -> AsyncIterator[Upload]:
    """Spools to disk while reading; the total is bounded by the body limit. Raises ApiError."""
    try:
        form = await request.form(
            max_files=len(_PARTS), max_fields=len(_PARTS), max_part_size=_MAX_TEXT
        )
    except MultiPartException as error:
        raise invalid(f"the upload cannot be read: {error.message}", None, "bad_upload") from error
    with tempfile.TemporaryDirectory(prefix="loraplex-upload-") as folder:
        try:
            yield await _read(form, Path(folder) / "adapter_model.safetensors")
        finally:
            await form.close()


async def _read(form: FormData, weights: Path) -> Upload:
    parts = {}
    for name, value in form.multi_items():
        known = _PARTS.get(name) or _PARTS.get(getattr(value, "filename", None) or "")
        if known is None:
            raise invalid(
                f"unknown part {name[:64]!r}; known: {', '.join(_PARTS)}", name[:64], "bad_upload"
            )
        if known in parts:
            raise invalid(f"the part {known!r} comes twice", known, "bad_upload")
        parts[known] = value
    for needed in ("config", "weights"):
        if needed not in parts:
            raise invalid(f"the part {needed!r} is missing", needed, "bad_upload")
    if isinstance(parts["weights"], str):
        raise invalid("weights must be sent as a file", "weights", "bad_upload")
    await run_in_threadpool(_copy, parts["weights"], weights)
    return Upload(
        config=await _bytes(parts["config"], "config"),
        weights=weights,
        chat_template=await _text(parts, "chat_template"),
        description=await _text(parts, "description"),
        examples=_examples(await _text(parts, "examples")),
    )


def _copy(upload: UploadFile, target: Path) -> None:
    with target.open("wb") as out:
        shutil.copyfileobj(upload.file, out, 1 << 20)


async def _bytes(value: UploadFile | str, name: str) -> bytes:
    if isinstance(value, str):
        return value.encode()
    data = await value.read(_MAX_TEXT + 1)
    if len(data) > _MAX_TEXT:
        raise ApiError(413, f"{name} is larger than 1 MiB", code="body_too_large", param=name)
    return data


async def _text(parts: dict[str, UploadFile | str], name: str) -> str | None:
    if name not in parts:
        return None
    try:
        return (await _bytes(parts[name], name)).decode()
    except UnicodeDecodeError as error:
        raise invalid(f"{name} is not UTF-8", name, "bad_upload") from error


def _examples(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    try:
        examples = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise invalid("examples must be a JSON list of texts", "examples", "bad_upload") from error
    if not isinstance(examples, list) or not all(isinstance(item, str) for item in examples):
        raise invalid("examples must be a JSON list of texts", "examples", "bad_upload")
    return tuple(examples)
