"""/v1/adapters: adapters as resources, whose ETag is the digest of their weights."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from loraplex_adapter_store.errors import AdapterInUse
from loraplex_adapter_store.names.card import AdapterCard, CardEdit
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.names.selector import NameRef
from loraplex_server.adapters.adding.card_file import fill_from_card
from loraplex_server.adapters.adding.sources import source_uri
from loraplex_server.adapters.adding.uploads import UPLOAD_SCHEMA, receive_upload
from loraplex_server.adapters.learning.jobs import Job, Progress
from loraplex_server.adapters.resolving.adapter_defaults import merged, read_defaults
from loraplex_server.adapters.worker_pools import result_within
from loraplex_server.api.adapter_card import (
    AdapterActivity,
    Report,
    card_response,
    conditions,
    shown_card,
)
from loraplex_server.api.adapter_path import ADAPTER_PATH, AdapterName, NewName, OwnName
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
from loraplex_server.api.state import (
    Access,
    AppState,
    State,
    allowed_sources,
    in_change_thread,
    in_load_thread,
    in_store_thread,
)
from loraplex_server.api.upload_folder import upload_folder
from loraplex_server.api.validation import read_body, validated
from loraplex_server.errors import ApiError, from_store
from loraplex_server.settings.api_keys import AdapterAccess

from .jobs import job_response

router = APIRouter(tags=["Adapters"])

Retain = Annotated[int | None, Query(ge=0, le=1000)]  # None: --keep-revisions
_SLOW = errors(404, 412, 415) | {
    202: {"model": JobShown, "description": "the load goes on; GET its `location`"}
}

# FastAPI cannot declare two kinds of body for one route. Bodies of other routes declare the parts
# that this schema refers to.
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
async def list_adapters(access: Access, state: State) -> Response:
    cards = access.listed(await in_store_thread(state, state.store.list, access))
    activity = AdapterActivity.of(state)
    data = [shown_card(access, card, activity, "none") for card in cards]
    folders = dict(state.refused_folders) if access.sees_all else {}
    refused = [{"name": name, "reason": reason} for name, reason in sorted(folders.items())]
    return ORJSONResponse({"object": "list", "data": data, "refused": refused})


@router.post("/v1/adapters/{name:path}/pin", response_model=Adapter, responses=errors(404))
async def pin_adapter(name: OwnName, access: Access, state: State) -> Response:
    """Keep the adapter in host memory, and on the device once it is loaded there."""
    state.lifecycle.check_engine()
    card = await in_load_thread(state, lambda: state.store.pin(name, access.quota), access)
    return card_response(state, access, card)


@router.post("/v1/adapters/{name:path}/unpin", response_model=Adapter, responses=errors(404))
async def unpin_adapter(name: OwnName, access: Access, state: State) -> Response:
    state.lifecycle.check_engine()
    card = await in_change_thread(state, lambda: state.store.unpin(name), access)
    return card_response(state, access, card)


@router.post("/v1/adapters/{name:path}/warm", response_model=Adapter, responses=_SLOW)
async def warm_adapter(name: AdapterName, access: Access, state: State) -> Response:
    """Load the adapter to host and device memory. A long load is answered with a job."""
    state.lifecycle.check_engine()
    await in_store_thread(state, lambda: state.store.get(name), access)  # 404 at once

    job = state.jobs.start(name, access, lambda report: _warm(state, name))
    card = await _finished(state, job)
    return card_response(state, access, card) if isinstance(card, AdapterCard) else card


@router.post("/v1/adapters/{name:path}/unload", response_model=Adapter, responses=errors(404, 409))
async def unload_adapter(name: OwnName, access: Access, state: State) -> Response:
    """Free an idle adapter's memory on device and host. The next request loads it again.

    The name and its files stay. 409 while a request uses the adapter, or while it is pinned.
    """
    state.lifecycle.check_engine()
    card = await in_store_thread(state, lambda: state.store.unload(name), access)
    if state.fleet is not None and (n_uses := await state.fleet.unload(card.digest)):
        raise from_store(AdapterInUse(name, n_uses), param="name", access=access)
    if state.device is not None:
        await state.device.unload(card.digest)
    return card_response(state, access, card)


@router.get(ADAPTER_PATH, response_model=Adapter, responses=errors(404))
async def show_adapter(
    name: AdapterName, access: Access, state: State, report: Report = "summary"
) -> Response:
    """Return the card. ``?report=full`` lists every tensor and module of the load report."""
    card = await in_store_thread(state, lambda: state.store.get(name), access)
    return card_response(state, access, card, report)


@router.put(
    ADAPTER_PATH,
    response_model=Adapter,
    responses=_SLOW | {201: {"model": Adapter, "description": "the name is new"}},
    openapi_extra=_EITHER_BODY,
)
async def put_adapter(
    request: Request,
    name: NewName,
    access: Access,
    state: State,
    report: Report = "summary",
    retain: Retain = None,
    warm: bool = False,
) -> Response:
    """Add or replace an adapter from a source (JSON) or an upload (multipart).

    ``If-Match`` makes it a compare-and-set. ``retain`` is the number of older contents to keep.
    With ``warm``, the answer comes once the adapter is in host memory and loads to the device.
    """
    state.lifecycle.check_admitting()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        card = await _put_source(state, request, access, name, retain)
    elif kind == "multipart/form-data":
        card = await _put_upload(state, request, access, name, retain)
    else:
        raise ApiError(
            415, "send application/json or multipart/form-data", code="unsupported_media_type"
        )
    if not isinstance(card, AdapterCard):
        return card
    if warm:
        await in_load_thread(state, lambda: _warm(state, name), access)
    # 201 if this very PUT has made the name, however many run at once.
    return card_response(state, access, card, report, status=200 if card.replaced else 201)


async def edit_adapter(
    request: Request, body: AdapterEdit, name: OwnName, access: Access, state: State
) -> Response:
    """Change description, examples and defaults of requests. The weights stay.

    ``If-Match`` makes it a compare-and-set.
    """
    state.lifecycle.check_engine()
    if_match, _ = conditions(request)
    fields = body.model_dump(exclude_unset=True)

    def change(card: AdapterCard) -> CardEdit:
        defaults = dict(card.defaults)
        if "defaults" in fields:
            patch = fields["defaults"]
            defaults = {} if patch is None else merged(defaults, patch)
        read_defaults(defaults)
        return CardEdit(
            fields.get("description", card.description),
            card.examples if "examples" not in fields else fields["examples"] or (),
            defaults,
        )

    card = await in_change_thread(
        state, lambda: state.store.edit(name, change, if_match=if_match), access
    )
    return card_response(state, access, card)


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
    access: Access,
    state: State,
    timeout_s: Annotated[float, Query(ge=0, le=3600, allow_inf_nan=False)] = 30.0,
) -> Response:
    """Remove the name at once, wait for running requests, and return the bytes that were freed."""
    state.lifecycle.check_engine()
    if_match, _ = conditions(request)
    deletion = await in_change_thread(
        state, lambda: state.store.start_delete(name, if_match=if_match), access
    )
    freed_bytes = await result_within(deletion.freed, timeout_s)
    report = deletion.report(freed_bytes)
    freed = {"disk": report.n_bytes_freed.disk, "host": report.n_bytes_freed.host, "device": 0}
    if report.drained:
        freed["device"] = await state.unloads.freed_bytes(report.digest)
    shown = {**report.to_json(), "name": access.shown(name)}
    return ORJSONResponse({**shown, "n_bytes_freed": freed, "deleted": True})


def _warm(state: AppState, name: str) -> AdapterCard:
    """Load the adapter to host memory, and begin its load to the device. Blocks."""
    with state.store.acquire(NameRef(name)) as lease:
        if state.device is not None:
            state.device.warm(lease)
    return state.store.get(name)


async def _put_source(
    state: AppState, request: Request, access: AdapterAccess, name: str, retain: int | None
) -> AdapterCard | Response:
    body = await read_body(request, AdapterSourceBody)
    uri = source_uri(allowed_sources(state), access, body.source, param="source")
    if_match, replace = conditions(request)
    read_defaults(body.defaults or {})

    def load(report: Progress) -> AdapterCard:
        return state.store.put_source(
            name,
            uri,
            progress=report,
            with_card=fill_from_card,
            options=PutOptions(
                if_match=if_match,
                replace=replace,
                description=body.description,
                examples=tuple(body.examples or ()),
                defaults=body.defaults,
                quota=access.quota,
                n_kept=retain,
            ),
        )

    job = state.jobs.start(name, access, load)
    return await _finished(state, job, body.wait)


async def _put_upload(
    state: AppState, request: Request, access: AdapterAccess, name: str, retain: int | None
) -> AdapterCard:
    if_match, replace = conditions(request)
    async with upload_folder(state, access, name) as (folder, count):
        upload = await receive_upload(request, folder, count)
        fields = {"description": upload.description, "examples": list(upload.examples)}
        validated(AdapterEdit, fields)  # within the same limits
        return await in_change_thread(
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
                    n_kept=retain,
                ),
            ),
            access,
        )


async def _finished(state: AppState, job: Job, wait: bool | None = None) -> AdapterCard | Response:
    """Return the card if the job ends in time, else 202 and its location. Raises ApiError."""
    timeout_s = {None: state.config.http.job_wait_s, True: None, False: 0.0}[wait]
    if not await state.jobs.wait(job, timeout_s):
        return job_response(job)
    if job.error is not None:
        raise job.error
    assert job.card is not None
    return job.card
