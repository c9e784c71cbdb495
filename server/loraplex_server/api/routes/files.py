"""/v1/files: files of calls for batches, training files, what is made from them, and images."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException

from loraplex_server.adapters.adding.arriving_bytes import Count
from loraplex_server.adapters.adding.uploads import FolderParser
from loraplex_server.api.batches.anthropic_files import (
    PURPOSE,
    anthropic_file,
    anthropic_page,
    last_of,
)
from loraplex_server.api.batches.file_checks import CHECKS
from loraplex_server.api.batches.image_files import check_image
from loraplex_server.api.batches.records import IMAGE_PURPOSES, FileRecord, InputSummary
from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.request_info import is_anthropic
from loraplex_server.api.serving.disconnect import unless_client_leaves
from loraplex_server.api.state import Access, AppState, State, Tenant
from loraplex_server.api.upload_folder import check_of_bytes, upload_folder
from loraplex_server.errors import ApiError, from_image, invalid
from loraplex_server.images import ImageRefused

router = APIRouter(route_class=JsonRoute, tags=["Files and batches"])

_MAX_NAME = 256  # characters of a file's name
_CHUNK = 1 << 16  # bytes
_PURPOSES = (*CHECKS, *IMAGE_PURPOSES)
_IMAGES = tuple(f"image/{kind}" for kind in ("jpeg", "png", "webp", "gif", "bmp"))
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            kind: {"schema": {"type": "string"}}
            for kind in ("application/jsonl", "text/csv", *_IMAGES)
        },
        "description": "the file's content",
    }
}
After = Annotated[str | None, Query(max_length=128)]
_Upload = tuple[UploadFile, str]  # the file and its purpose
_FILE_SCHEMA = {  # the form's schema in /openapi.json
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": [*_PURPOSES]},
    },
}
_BODY = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FILE_SCHEMA}}}
}


class File(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal[
        "batch", "batch_output", "fine-tune", "fine-tune-results", "vision", "user_data"
    ]
    status: Literal["processed"]


class Page(BaseModel):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileList(Page):
    data: list[File]


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


@router.post("/v1/files", response_model=File, responses=errors(415), openapi_extra=_BODY)
async def upload_file(request: Request, tenant: Tenant, access: Access, state: State) -> Response:
    """Store a file of calls for a batch, of training examples, or an image for chats.

    Each line is checked here, and an image is decoded. Anthropic's clients name no purpose, and
    upload images.
    """
    state.lifecycle.check_admitting()
    store, limits = state.batches.store, state.batches.store.limits
    n_stored = await state.batches.do(tenant, lambda: store.n_bytes(tenant))
    with state.arriving_files.upload(
        tenant, lambda n: limits.check_bytes(n_stored + n)
    ) as of_files:
        async with upload_folder(state, access) as (folder, of_tenant):
            upload, purpose = await _receive(request, folder, (of_files, of_tenant))
            (path,) = folder.iterdir()
            check = _check(state, path, tenant, purpose)
            summary = await unless_client_leaves(check, request.receive)
            check_bytes = await check_of_bytes(state, access)  # others may be stored meanwhile
            check_bytes(state.arriving.of(access.tenant or ""))
            name = (upload.filename or "file.jsonl")[:_MAX_NAME]
            file = await state.batches.do(
                tenant, lambda: store.add_file(tenant, path, name, purpose, summary)
            )
    return _shown(request, file)


@router.get("/v1/files", response_model=FileList, responses=errors())
async def list_files(
    request: Request,
    tenant: Tenant,
    state: State,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: After = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    page: After = None,
) -> Response:
    """List the files. ``page`` continues a list in the form of Anthropic's clients."""
    store = state.batches.store
    after = after or last_of(page)
    files, more = await state.batches.do(
        tenant,
        lambda: store.files(
            tenant, limit=limit, after=after, purpose=purpose, oldest_first=order == "asc"
        ),
    )
    if is_anthropic(request):
        return ORJSONResponse(anthropic_page(files, has_more=more))
    return page_of([file.to_json() for file in files], has_more=more)


@router.get("/v1/files/{file_id}", response_model=File, responses=errors(404))
async def show_file(file_id: str, request: Request, tenant: Tenant, state: State) -> Response:
    file = await state.batches.do(tenant, lambda: state.batches.store.file(tenant, file_id))
    return _shown(request, file)


@router.get(
    "/v1/files/{file_id}/content", response_class=Response, responses=_CONTENT | errors(404)
)
async def file_content(file_id: str, tenant: Tenant, state: State) -> Response:
    store = state.batches.store

    def open_file() -> tuple[FileRecord, BinaryIO]:
        return store.file(tenant, file_id), store.path(file_id).open("rb")

    record, file = await state.batches.do(tenant, open_file)
    return StreamingResponse(
        _chunks(file),
        media_type=record.media_type,
        headers={"content-length": str(record.n_bytes)},
    )


@router.delete("/v1/files/{file_id}", response_model=DeletedFile, responses=errors(404, 409))
async def delete_file(file_id: str, request: Request, tenant: Tenant, state: State) -> Response:
    await state.batches.do(tenant, lambda: state.batches.store.delete_file(tenant, file_id))
    if is_anthropic(request):
        return ORJSONResponse({"id": file_id, "type": "file_deleted"})
    return ORJSONResponse({"id": file_id, "object": "file", "deleted": True})


def page_of(data: list[dict[str, object]], *, has_more: bool) -> Response:
    """Return a page of a list in OpenAI's form."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    ends = {"first_id": first, "last_id": last, "has_more": has_more}
    return ORJSONResponse({"object": "list", "data": data, **ends})


def _shown(request: Request, file: FileRecord) -> Response:
    return ORJSONResponse(anthropic_file(file) if is_anthropic(request) else file.to_json())


async def _check(state: AppState, path: Path, tenant: str, purpose: str) -> InputSummary:
    """Check the file and flush it to the disk. Raises ApiError (400, 413, 429, 503)."""
    http = state.config.http
    if purpose not in IMAGE_PURPOSES:
        return await state.file_checks.check(
            path,
            tenant,
            purpose,
            max_lines=state.batches.store.limits.max_lines,
            max_line_bytes=http.max_body_bytes,
        )
    work = partial(check_image, path, http.image_limits)
    try:
        return await state.pools.images.run(tenant, work)
    except ImageRefused as error:
        raise from_image(error, "file") from error


async def _receive(request: Request, folder: Path, counts: Sequence[Count]) -> _Upload:
    """Write the file of a form to ``folder``. Raises ApiError, also those of ``counts``."""
    if "multipart/form-data" not in request.headers.get("content-type", ""):
        raise ApiError(415, "send multipart/form-data", code="unsupported_media_type")

    def count(n_bytes: int) -> None:
        for each in counts:
            each(n_bytes)

    parser = FolderParser(
        request.headers,
        request.stream(),
        folder=folder,
        count=count,
        max_files=1,
        max_fields=1,
        max_part_size=64,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise invalid(f"the upload cannot be read: {error.message}", None) from error
    await form.close()
    return _checked(form, PURPOSE if is_anthropic(request) else None)


def _checked(form: FormData, default_purpose: str | None) -> _Upload:
    """Return the file of a form and its purpose. Raises ApiError (400)."""
    if unknown := sorted(form.keys() - {"file", "purpose"}):
        raise invalid(f"unknown part {unknown[0][:64]!r}; known: file, purpose", unknown[0][:64])
    upload, purpose = form.get("file"), form.get("purpose", default_purpose)
    if not isinstance(upload, UploadFile):
        raise invalid("the part 'file' is missing, or is no file", "file")
    if not isinstance(purpose, str) or purpose not in _PURPOSES:
        known = ", ".join(map(repr, _PURPOSES))
        raise invalid(f"purpose must be one of {known}, not {str(purpose)[:64]!r}", "purpose")
    return upload, purpose


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK):
            yield chunk
