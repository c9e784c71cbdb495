"""/v1/adapters: the life of an adapter as a resource; its ETag is the digest of its weights."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool

from loraplex_adapter_store.card import AdapterCard, CardEdit
from loraplex_adapter_store.errors import AdapterInUse
from loraplex_adapter_store.put_options import PutOptions
from loraplex_adapter_store.selector import NameRef
from loraplex_server.adapters.access import access_of
from loraplex_server.adapters.adapter_defaults import merged
from loraplex_server.adapters.card_file import told_by_card
from loraplex_server.adapters.jobs import Job, Progress
from loraplex_server.adapters.sources import source_uri
from loraplex_server.adapters.uploads import UPLOAD_SCHEMA, receive_upload
from loraplex_server.adapters.waiting import result_within
from loraplex_server.api.adapter_card import (
    Report,
    Seen,
    card_response,
    checked_defaults,
    conditions,
    shown_card,
)
from loraplex_server.api.adapter_path import ADAPTER_PATH, AdapterName, NewName, OwnName
from loraplex_server.api.errors import ApiError, from_store
from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.adapters import (
    Adapter,
    AdapterEdit,
    AdapterList,
    AdapterSourceBody,
    Deleted,
    JobShown,
)
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.state import AppState, State, in_load_thread, in_store_thread
from loraplex_server.api.validation import read_body, validated
from loraplex_server.api_keys import AdapterAccess

__all__ = ["router"]

router = APIRouter()

_SLOW = errors(404, 412, 415) | {
    202: {"model": JobShown, "description": "still loading; GET its `location`"}
}

# FastAPI cannot declare two kinds of body for one route. What the schema refers to is declared by
# the bodies of other routes.
_SOURCE_SCHEMA = {
    key: value
    for key, value in AdapterSourceBody.model_json_schema(
        ref_template="#/components/schemas/{model}"
    ).items()
    if key != "$defs"
}
_EITHER_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": _SOURCE_SCHEMA},
            "multipart/form-data": {"schema": UPLOAD_SCHEMA},
        },
    }
}


@router.get("/v1/adapters", response_model=AdapterList, responses=errors())
async def list_adapters(request: Request, state: State) -> Response:
    access = access_of(request)
    cards = access.listed(await in_store_thread(state, state.store.list))
    seen = Seen.of(state)
    data = [shown_card(access, card, seen, "none") for card in cards]
    return ORJSONResponse({"object": "list", "data": data})


@router.post("/v1/adapters/{name:path}/pin", response_model=Adapter, responses=errors(404))
async def pin_adapter(request: Request, name: OwnName, state: State) -> Response:
    """Keeps it in host memory, and on the device once it is there."""
    state.lifecycle.check_engine()
    access = access_of(request)
    card = await in_load_thread(state, lambda: state.store.pin(name, access.quota), access)
    return card_response(state, access_of(request), card)


@router.post("/v1/adapters/{name:path}/unpin", response_model=Adapter, responses=errors(404))
async def unpin_adapter(request: Request, name: OwnName, state: State) -> Response:
    state.lifecycle.check_engine()
    card = await in_store_thread(
        state,
        lambda: state.store.unpin(name),
        access_of(request),
        pool=state.pools.changes,
    )
    return card_response(state, access_of(request), card)


@router.post("/v1/adapters/{name:path}/warm", response_model=Adapter, responses=_SLOW)
async def warm_adapter(request: Request, name: AdapterName, state: State) -> Response:
    """Loads to host and device memory; a load that takes long is answered with a job."""
    state.lifecycle.check_engine()
    # 404 at once
    await in_store_thread(state, lambda: state.store.get(name), access_of(request))

    def warm(report: Progress) -> AdapterCard:
        with state.store.acquire(NameRef(name)) as lease:
            if state.device is not None:
                state.device.warm(lease)
        return state.store.get(name)

    job = state.jobs.start(name, access_of(request), warm)
    card = await _finished(state, job)
    if not isinstance(card, AdapterCard):
        return card
    return card_response(state, access_of(request), card)


@router.post("/v1/adapters/{name:path}/unload", response_model=Adapter, responses=errors(404, 409))
async def unload_adapter(request: Request, name: OwnName, state: State) -> Response:
    """Frees an idle adapter's memory, on device and host; the next request loads it again.

    The name and its files stay. 409 while a request uses it, or while it is pinned.
    """
    state.lifecycle.check_engine()
    access = access_of(request)
    card = await in_store_thread(state, lambda: state.store.unload(name), access)
    if state.fleet is not None and (n_uses := await state.fleet.unload(card.digest)):
        raise from_store(AdapterInUse(name, n_uses), param="name", access=access)
    if state.device is not None:
        await state.device.unload(card.digest)
    return card_response(state, access, card)


@router.get(ADAPTER_PATH, response_model=Adapter, responses=errors(404))
async def show_adapter(
    request: Request, name: AdapterName, state: State, report: Report = "summary"
) -> Response:
    """``?report=full`` names every tensor and module of the load report."""
    card = await in_store_thread(state, lambda: state.store.get(name), access_of(request))
    return card_response(state, access_of(request), card, report)


@router.put(
    ADAPTER_PATH,
    response_model=Adapter,
    responses=_SLOW | {201: {"model": Adapter, "description": "the name is new"}},
    openapi_extra=_EITHER_BODY,
)
async def put_adapter(
    request: Request,
    name: NewName,
    state: State,
    report: Report = "summary",
) -> Response:
    """From a source (JSON) or an upload (multipart). ``If-Match`` makes it compare-and-set."""
    state.lifecycle.check_admitting()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return await _put_source(state, request, name, report)
    if kind == "multipart/form-data":
        return await _put_upload(state, request, name, report)
    raise ApiError(
        415, "send application/json or multipart/form-data", code="unsupported_media_type"
    )


async def edit_adapter(
    request: Request, body: AdapterEdit, name: OwnName, state: State
) -> Response:
    """Description, examples and defaults of requests; the weights stay. ``If-Match`` compares."""
    state.lifecycle.check_engine()
    if_match, _ = conditions(request)
    given = body.model_dump(exclude_unset=True)

    def change(card: AdapterCard) -> CardEdit:
        defaults = dict(card.defaults)
        if "defaults" in given:
            patch = given["defaults"]
            defaults = {} if patch is None else merged(defaults, patch)
        return CardEdit(
            given.get("description", card.description),
            card.examples if "examples" not in given else given["examples"] or (),
            checked_defaults(defaults),
        )

    card = await in_store_thread(
        state,
        lambda: state.store.edit(name, change, if_match=if_match),
        access_of(request),
        pool=state.pools.changes,
    )
    return card_response(state, access_of(request), card)


router.add_api_route(
    ADAPTER_PATH,
    edit_adapter,
    methods=["PATCH"],
    response_model=Adapter,
    responses=errors(404, 412, 415),
    route_class_override=JsonRoute,
)


@router.delete(ADAPTER_PATH, response_model=Deleted, responses=errors(404, 412))
async def delete_adapter(
    request: Request,
    name: OwnName,
    state: State,
    timeout_s: Annotated[float, Query(ge=0, le=3600, allow_inf_nan=False)] = 30.0,
) -> Response:
    """The name is gone at once; waits for running requests, then says how many bytes were freed."""
    state.lifecycle.check_engine()
    if_match, _ = conditions(request)
    deletion = await in_store_thread(
        state,
        lambda: state.store.start_delete(name, if_match=if_match),
        access_of(request),
        pool=state.pools.changes,
    )
    freed_bytes = await result_within(deletion.freed, timeout_s)
    report = deletion.report(freed_bytes)
    freed = {"disk": report.n_bytes_freed.disk, "host": report.n_bytes_freed.host, "device": 0}
    if report.drained:
        freed["device"] = await state.unloads.freed_bytes(report.digest)
    told = {**report.to_json(), "name": access_of(request).shown(name)}
    return ORJSONResponse({**told, "n_bytes_freed": freed, "deleted": True})


async def _put_source(state: AppState, request: Request, name: str, shown: Report) -> Response:
    body = await read_body(request, AdapterSourceBody)
    access = access_of(request)
    uri = source_uri(state, access, body.source, param="source")
    if_match, replace = conditions(request)
    defaults = None if body.defaults is None else checked_defaults(body.defaults)

    def load(report: Progress) -> AdapterCard:
        return state.store.put_source(
            name,
            uri,
            progress=report,
            with_card=told_by_card,
            options=PutOptions(
                if_match=if_match,
                replace=replace,
                description=body.description,
                examples=tuple(body.examples or ()),
                defaults=defaults,
                quota=access.quota,
            ),
        )

    job = state.jobs.start(name, access, load)
    card = await _finished(state, job, body.wait)
    return _stored(state, access, card, shown) if isinstance(card, AdapterCard) else card


async def _put_upload(state: AppState, request: Request, name: str, shown: Report) -> Response:
    if_match, replace = conditions(request)
    access = access_of(request)
    async with contextmanager_in_threadpool(state.store.upload_folder()) as folder:
        upload = await receive_upload(request, folder)
        told = {"description": upload.description, "examples": list(upload.examples)}
        validated(AdapterEdit, told)  # within the same limits
        card = await in_store_thread(
            state,
            lambda: state.store.put_files(
                name,
                upload.config,
                upload.weights,
                chat_template=upload.chat_template,
                companions=upload.companions,
                options=PutOptions(
                    if_match=if_match,
                    replace=replace,
                    description=upload.description,
                    examples=upload.examples,
                    defaults=upload.defaults,
                    quota=access.quota,
                ),
            ),
            access,
            pool=state.pools.changes,
        )
    return _stored(state, access, card, shown)


async def _finished(state: AppState, job: Job, wait: bool | None = None) -> AdapterCard | Response:
    """The card if the job ends in time, else 202 and where to look. Raises the job's ApiError."""
    timeout_s = {None: state.config.http.job_wait_s, True: None, False: 0.0}[wait]
    if not await state.jobs.wait(job, timeout_s):
        headers = {"location": f"/v1/jobs/{job.id}"}
        return ORJSONResponse(job.to_json(), status=202, headers=headers)
    if job.error is not None:
        raise job.error
    assert job.card is not None
    return job.card


def _stored(state: AppState, access: AdapterAccess, card: AdapterCard, shown: Report) -> Response:
    """201 where this very put has made the name, however many puts ran beside it."""
    return card_response(state, access, card, shown, status=200 if card.replaced else 201)
