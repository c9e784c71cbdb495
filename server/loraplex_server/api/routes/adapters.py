"""/v1/adapters: the life of an adapter as a resource; its ETag is the digest of its weights."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.selector import NameRef
from loraplex_server.adapters.access import AdapterName, access_of
from loraplex_server.adapters.jobs import Job, JobStatus, Progress
from loraplex_server.adapters.sources import source_uri
from loraplex_server.adapters.uploads import receive_upload
from loraplex_server.api.errors import ApiError, invalid, not_found
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.adapters import AdapterSourceBody
from loraplex_server.api.state import AppState, in_store_thread, state_of
from loraplex_server.api.validation import read_body

__all__ = ["router"]

router = APIRouter()

# FastAPI cannot declare two kinds of body for one route.
_EITHER_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": AdapterSourceBody.model_json_schema()},
            "multipart/form-data": {"schema": {"type": "object"}},
        },
    }
}


@router.get("/v1/adapters")
async def list_adapters(request: Request) -> Response:
    services = state_of(request)
    resident = set(services.engine.stats().resident_adapters)
    cards = await in_store_thread(services, services.store.list)
    access = access_of(request)
    data = [_shown(card, resident, with_report=False) for card in cards if access.allows(card.name)]
    return ORJSONResponse({"object": "list", "data": data})


@router.get("/v1/jobs/{job_id}")
async def show_job(request: Request, job_id: str) -> Response:
    job = state_of(request).jobs.get(job_id)
    if job is None or not access_of(request).allows(job.adapter):
        raise not_found(f"job {job_id[:64]!r} is not known (any more)", "job_id", "job_not_found")
    return ORJSONResponse(job.to_json())


@router.post("/v1/adapters/{name:path}/pin")
async def pin_adapter(request: Request, name: AdapterName) -> Response:
    """Keeps it in host memory, and on the device once it is there."""
    services = state_of(request)
    card = await in_store_thread(services, lambda: services.store.pin(name), access_of(request))
    if services.device is not None:
        services.device.set_pinned(card.digest, True)
    return _answer(services, card)


@router.post("/v1/adapters/{name:path}/unpin")
async def unpin_adapter(request: Request, name: AdapterName) -> Response:
    services = state_of(request)
    card = await in_store_thread(services, lambda: services.store.unpin(name), access_of(request))
    if services.device is not None:
        services.device.set_pinned(card.digest, False)
    return _answer(services, card)


@router.post("/v1/adapters/{name:path}/warm")
async def warm_adapter(request: Request, name: AdapterName) -> Response:
    """Loads to host and device memory; a load that takes long is answered with a job."""
    services = state_of(request)
    # 404 at once
    await in_store_thread(services, lambda: services.store.get(name), access_of(request))

    def warm(report: Progress) -> AdapterCard:
        with services.store.acquire(NameRef(name)) as lease:
            if services.device is not None:
                services.device.warm(lease.plan)
        return services.store.get(name)

    job = services.jobs.start(name, warm)
    return await _outcome(services, job, wait=None, created=False)


@router.get("/v1/adapters/{name:path}")
async def show_adapter(request: Request, name: AdapterName) -> Response:
    services = state_of(request)
    card = await in_store_thread(services, lambda: services.store.get(name), access_of(request))
    return _answer(services, card)


@router.put("/v1/adapters/{name:path}", openapi_extra=_EITHER_BODY)
async def put_adapter(request: Request, name: AdapterName) -> Response:
    """From a source (JSON) or an upload (multipart). ``If-Match`` makes it compare-and-set."""
    services = state_of(request)
    services.lifecycle.check_admitting()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return await _put_source(services, request, name)
    if kind == "multipart/form-data":
        return await _put_upload(services, request, name)
    raise ApiError(
        415, "send application/json or multipart/form-data", code="unsupported_media_type"
    )


@router.delete("/v1/adapters/{name:path}")
async def delete_adapter(request: Request, name: AdapterName, timeout_s: float = 30.0) -> Response:
    """The name is gone at once; waits for running requests, then says how many bytes were freed."""
    services = state_of(request)
    if not 0 <= timeout_s <= 3600:
        raise invalid("timeout_s must lie between 0 and 3600", "timeout_s")
    if_match, _ = _conditions(request)
    report = await in_store_thread(
        services,
        lambda: services.store.delete(name, if_match=if_match, timeout_s=timeout_s),
        access_of(request),
    )
    freed = {"disk": report.n_bytes_freed.disk, "host": report.n_bytes_freed.host, "device": 0}
    if report.drained:
        freed["device"] = await services.unloads.freed_bytes(report.digest)
    return ORJSONResponse({**report.to_json(), "n_bytes_freed": freed, "deleted": True})


async def _put_source(services: AppState, request: Request, name: str) -> Response:
    body = await read_body(request, AdapterSourceBody)
    uri = source_uri(services, body.source, param="source")
    if_match, replace = _conditions(request)
    created = not await _exists(services, name)

    def load(report: Progress) -> AdapterCard:
        return services.store.put_source(
            name,
            uri,
            if_match=if_match,
            replace=replace,
            description=body.description,
            examples=tuple(body.examples or ()),
            progress=report,
        )

    job = services.jobs.start(name, load)
    return await _outcome(services, job, wait=body.wait, created=created)


async def _put_upload(services: AppState, request: Request, name: str) -> Response:
    if_match, replace = _conditions(request)
    async with receive_upload(request) as upload:
        created = not await _exists(services, name)
        card = await in_store_thread(
            services,
            lambda: services.store.put_files(
                name,
                upload.config,
                upload.weights,
                chat_template=upload.chat_template,
                if_match=if_match,
                replace=replace,
                description=upload.description,
                examples=upload.examples,
            ),
        )
    return _answer(services, card, status=201 if created else 200)


async def _outcome(services: AppState, job: Job, *, wait: bool | None, created: bool) -> Response:
    """The card if the job ends in time, else 202 and where to look."""
    timeout_s = {None: services.config.http.job_wait_s, True: None, False: 0.0}[wait]
    if not await services.jobs.wait(job, timeout_s):
        headers = {"location": f"/v1/jobs/{job.id}"}
        return ORJSONResponse(job.to_json(), status=202, headers=headers)
    if job.status is JobStatus.FAILED:
        assert job.error is not None
        raise job.error
    assert job.card is not None
    return _answer(services, job.card, status=201 if created else 200)


async def _exists(services: AppState, name: str) -> bool:
    try:
        await in_store_thread(services, lambda: services.store.get(name))
    except ApiError as error:
        if error.status == 404:
            return False
        raise
    return True


def _conditions(request: Request) -> tuple[str | None, bool]:
    """(If-Match as a digest, whether an existing adapter may be replaced)."""
    if_match = request.headers.get("if-match")
    if_none = request.headers.get("if-none-match")
    if if_none is not None and if_none.strip() != "*":
        raise invalid("If-None-Match must be *", "If-None-Match")
    if if_match is not None:
        if_match = if_match.strip().removeprefix("W/").strip('"')
        if len(if_match) != 64 or not set(if_match) <= set("0123456789abcdef"):
            raise invalid("If-Match must be the adapter's ETag, a full digest", "If-Match")
    return if_match, if_none is None


def _answer(services: AppState, card: AdapterCard, *, status: int = 200) -> Response:
    resident = set(services.engine.stats().resident_adapters)
    shown = _shown(card, resident, with_report=True)
    return ORJSONResponse(shown, status=status, headers={"etag": f'"{card.digest}"'})


def _shown(card: AdapterCard, resident: set[str], *, with_report: bool) -> dict[str, object]:
    shown: dict[str, object] = {"object": "adapter", **card.to_json()}
    if not with_report:
        del shown["report"]
    tier = "device" if card.digest in resident else "host" if card.n_bytes.host else "disk"
    provenance = {key: value for key, value in card.provenance.items() if key != "path"}
    return {**shown, "tier": tier, "provenance": provenance}
