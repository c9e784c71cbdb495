"""Multipart uploads of an adapter: named parts only, sizes bounded while they stream in.

The weights are written once, beside the store's contents: never in /tmp, which may be memory.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson
from pydantic import JsonValue, TypeAdapter
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from loraplex_adapter_store.files.file_names import COMPANION_FILES
from loraplex_adapter_store.files.json_size import check_depth
from loraplex_server.errors import ApiError, invalid

from .card_file import MAX_CARD_TEXT, read_card_file

_MAX_TEXT = 1 << 20  # bytes of each part but the weights
_TEXTS = TypeAdapter(tuple[str, ...])
# accepted names of a part → what it is
_PARTS = {
    "config": "config",
    "adapter_config.json": "config",
    "weights": "weights",
    "adapter_model.safetensors": "weights",
    "chat_template": "chat_template",
    "chat_template.jinja": "chat_template",
    **{name: name for name in COMPANION_FILES},
    "card": "card",
    "card.json": "card",
    "description": "description",
    "examples": "examples",
}
_FILE = {"type": "string", "format": "binary"}
_TEXT = {"type": "string"}
UPLOAD_SCHEMA = {  # of the form, for /openapi.json
    "type": "object",
    "required": ["config", "weights"],
    "additionalProperties": False,
    "properties": {
        "config": _FILE,
        "weights": _FILE,
        "chat_template": _FILE,
        **dict.fromkeys(COMPANION_FILES, _FILE),
        "card": _FILE,
        "description": {**_TEXT, "maxLength": MAX_CARD_TEXT},
        "examples": {**_TEXT, "contentMediaType": "application/json"},  # a list of texts
    },
}


@dataclass(frozen=True, slots=True)
class Upload:
    config: bytes
    weights: Path  # closed, in the folder of ``receive_upload``
    chat_template: str | None
    companions: Mapping[str, bytes]
    description: str | None
    examples: tuple[str, ...]
    defaults: Mapping[str, JsonValue]  # of requests, as card.json gives them


async def receive_upload(request: Request, folder: Path, count: Callable[[int], None]) -> Upload:
    """Writes the uploaded files to the empty ``folder`` as they arrive. The body limit applies.

    ``count`` gets the number of bytes before they are written. Raises ApiError, also that of
    ``count``.
    """
    if "multipart" not in request.headers.get("content-type", ""):
        raise invalid("the upload is no multipart/form-data", None, "bad_upload")
    parser = FolderParser(
        request.headers,
        request.stream(),
        folder=folder,
        count=count,
        max_files=len(_PARTS),
        max_fields=len(_PARTS),
        max_part_size=_MAX_TEXT,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise invalid(f"the upload cannot be read: {error.message}", None, "bad_upload") from error
    try:
        return await _read(form)
    finally:
        await form.close()


class FolderParser(MultiPartParser):
    """A form parser that writes files directly to their folder, without temporary files."""

    def __init__(
        self,
        headers: Headers,
        stream: AsyncGenerator[bytes, None],
        *,
        folder: Path,
        count: Callable[[int], None],
        max_files: int,
        max_fields: int,
        max_part_size: int,
    ) -> None:
        super().__init__(
            headers,
            stream,
            max_files=max_files,
            max_fields=max_fields,
            max_part_size=max_part_size,
        )
        self._folder = folder
        self._count = count

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        super().on_part_data(data, start, end)

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        upload = self._current_part.file
        if upload is not None:
            upload.file.close()
            path = self._folder / str(self._current_files)
            upload.file = path.open("w+b")
            self._files_to_close_on_error.append(upload.file)  # type: ignore[arg-type]


async def _read(form: FormData) -> Upload:
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
    weights = parts["weights"]
    if isinstance(weights, str):
        raise invalid("weights must be sent as a file", "weights", "bad_upload")
    card = read_card_file(await _text(parts, "card") or "{}")
    examples = await _text(parts, "examples")
    return Upload(
        config=await _bytes(parts["config"], "config"),
        weights=Path(weights.file.name),
        chat_template=await _text(parts, "chat_template"),
        companions={
            name: await _bytes(parts[name], name) for name in COMPANION_FILES if name in parts
        },
        description=await _text(parts, "description") or card.description,
        examples=card.examples if examples is None else _examples(examples),
        defaults=card.defaults,
    )


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


def _examples(text: str) -> tuple[str, ...]:
    try:
        check_depth(text)
        return _TEXTS.validate_python(orjson.loads(text))
    except ValueError as error:
        raise invalid("examples must be a JSON list of texts", "examples", "bad_upload") from error
