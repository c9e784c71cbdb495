"""/v1/files: the calls of batches and their answers, as JSONL."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool
from fastapi.responses import StreamingResponse
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException

from loraplex_server.adapters.uploads import FolderParser
from loraplex_server.api.batches.input_file import check_input
from loraplex_server.api.errors import ApiError, invalid
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.batches import FILE_SCHEMA, DeletedFile, File, FileList
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.request_info import info_of
from loraplex_server.api.state import State

__all__ = ["page", "router"]

router = APIRouter()

_MAX_NAME = 256  # characters of a file's name
_CHUNK = 1 << 16  # bytes
_BODY = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FILE_SCHEMA}}}
}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"application/jsonl": {"schema": {"type": "string"}}},
        "description": "the file as it is",
    }
}


@router.post("/v1/files", response_model=File, responses=errors(415), openapi_extra=_BODY)
async def upload_file(request: Request, state: State) -> Response:
    """A file of calls, one a line; each is checked here, and run by a batch."""
    state.lifecycle.check_admitting()
    tenant = info_of(request.scope).tenant
    store = state.batches.store
    async with contextmanager_in_threadpool(state.store.upload_folder()) as folder:
        parser = FolderParser(
            request.headers,
            request.stream(),
            folder=folder,
            max_files=1,
            max_fields=1,
            max_part_size=64,
        )
        if "multipart/form-data" not in request.headers.get("content-type", ""):
            raise ApiError(415, "send multipart/form-data", code="unsupported_media_type")
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise invalid(f"the upload cannot be read: {error.message}", None) from error
        await form.close()
        upload = _checked(form)
        (path,) = folder.iterdir()
        summary = await asyncio.get_running_loop().run_in_executor(
            state.pools.changes,
            lambda: check_input(
                path,
                max_lines=store.limits.max_lines,
                max_line_bytes=state.config.http.max_body_bytes,
            ),
        )
        name = (upload.filename or "file.jsonl")[:_MAX_NAME]
        file = await state.batches.do(lambda: store.add_file(tenant, path, name, summary))
    return ORJSONResponse(file.to_json())


@router.get("/v1/files", response_model=FileList, responses=errors())
async def list_files(
    request: Request,
    state: State,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: Annotated[str | None, Query(max_length=128)] = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    tenant = info_of(request.scope).tenant
    store = state.batches.store
    found, more = await state.batches.do(
        lambda: store.files(
            tenant, limit=limit, after=after, purpose=purpose, oldest_first=order == "asc"
        )
    )
    return page([file.to_json() for file in found], has_more=more)


@router.get("/v1/files/{file_id}", response_model=File, responses=errors(404))
async def show_file(request: Request, file_id: str, state: State) -> Response:
    tenant = info_of(request.scope).tenant
    file = await state.batches.do(lambda: state.batches.store.file(tenant, file_id))
    return ORJSONResponse(file.to_json())


@router.get(
    "/v1/files/{file_id}/content", response_class=Response, responses=_CONTENT | errors(404)
)
async def file_content(request: Request, file_id: str, state: State) -> Response:
    tenant = info_of(request.scope).tenant
    store = state.batches.store

    def open_file() -> tuple[int, BinaryIO]:
        return store.file(tenant, file_id).n_bytes, store.path(file_id).open("rb")

    n_bytes, file = await state.batches.do(open_file)
    return StreamingResponse(
        _pieces(file),
        media_type="application/jsonl",
        headers={"content-length": str(n_bytes)},
    )


@router.delete("/v1/files/{file_id}", response_model=DeletedFile, responses=errors(404, 409))
async def delete_file(request: Request, file_id: str, state: State) -> Response:
    tenant = info_of(request.scope).tenant
    await state.batches.do(lambda: state.batches.store.delete_file(tenant, file_id))
    return ORJSONResponse({"id": file_id, "object": "file", "deleted": True})


def page(data: list[dict[str, object]], *, has_more: bool) -> Response:
    """A page of a list, as OpenAI's clients turn it."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    ends = {"first_id": first, "last_id": last, "has_more": has_more}
    return ORJSONResponse({"object": "list", "data": data, **ends})


def _checked(form: FormData) -> UploadFile:
    if unknown := sorted(form.keys() - {"file", "purpose"}):
        raise invalid(f"unknown part {unknown[0][:64]!r}; known: file, purpose", unknown[0][:64])
    upload, purpose = form.get("file"), form.get("purpose")
    if not isinstance(upload, UploadFile):
        raise invalid("the part 'file' is missing, or is no file", "file")
    if purpose != "batch":
        raise invalid(f"purpose must be 'batch', not {str(purpose)[:64]!r}", "purpose")
    return upload


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(_CHUNK):
            yield piece
