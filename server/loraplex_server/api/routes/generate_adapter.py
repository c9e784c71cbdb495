"""POST /v1/adapters/generate: a description in, a registered adapter out."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.selector import NameRef
from loraplex_server.adapters.access import access_of, check_allowed, name_to_write
from loraplex_server.adapters.base_agreement import base_agreement
from loraplex_server.adapters.generated_adapters import AdapterGenerationRequest
from loraplex_server.api.adapter_card import Report, Seen, shown_card
from loraplex_server.api.errors import ApiError, from_store, invalid
from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.adapters import Adapter, GenerateAdapterBody, JobShown
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.state import AppState, State, in_load_thread, in_store_thread
from loraplex_server.api_keys import GENERATED, AdapterAccess
from loraplex_server.engine.errors import EngineError

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/adapters/generate",
    status_code=201,
    response_model=Adapter,
    responses=errors(404, 409, 412, 415, 422)
    | {202: {"model": JobShown, "description": "learning from the examples; see its `location`"}},
)
async def generate_adapter(
    body: GenerateAdapterBody, request: Request, state: State, report: Report = "summary"
) -> Response:
    """The card says where the adapter came from: method, parts, scores, digests.

    With ``examples``, a draft is served at once and replaced when something better was learnt.
    """
    state.lifecycle.check_admitting()
    adapters = state.generated
    if adapters is None:
        raise invalid(
            "adapter generation is not enabled on this server", None, "feature_not_enabled"
        )
    access = access_of(request)
    if body.name is None:
        check_allowed(access, GENERATED, param="name")
    name = body.name and await in_store_thread(
        state, lambda: name_to_write(state.store, access, body.name or "", param="name"), access
    )
    order = AdapterGenerationRequest(
        body.description.strip(),
        tuple(body.wordings),
        tuple(body.prompts),
        body.method,
        body.seed,
        body.samples,
        tuple((pair.prompt, pair.answer) for pair in body.examples or ()),
        body.force,
    )
    if body.examples:
        learnt = await _learnt(state, body, order, access, name)
        if isinstance(learnt, Response):
            return learnt
        return await _answer(state, access, body, learnt, report)
    _check_no_job_fields(body)
    card = await in_store_thread(
        state,
        lambda: adapters.ensure(
            order,
            tenant=access.tenant or "",
            name=name,
            ttl_s=body.ttl_s,
            quota=access.quota,
        ),
        access,
        pool=state.pools.generation,
        param="description",
    )
    return await _answer(state, access, body, card, report)


async def _learnt(
    state: AppState,
    body: GenerateAdapterBody,
    order: AdapterGenerationRequest,
    access: AdapterAccess,
    name: str | None,
) -> AdapterCard | Response:
    """The card where nothing is left to do or was waited for, else 202 and the job."""
    if state.learning is None:
        raise invalid("this server learns nothing from examples", "examples", "feature_not_enabled")
    try:
        card, job, _ = await state.learning.order(
            order, access, name=name, ttl_s=body.ttl_s, budget_s=body.budget_s
        )
    except StoreError as error:
        raise from_store(error, param="description", access=access) from error
    if job is None:
        assert card is not None
        return card
    if body.wait:
        return await state.learning.wait(job)
    headers = {"location": f"/v1/jobs/{job.id}"}
    return ORJSONResponse(job.to_json(), status=202, headers=headers)


def _check_no_job_fields(body: GenerateAdapterBody) -> None:
    for field in ("budget_s", "wait"):
        if field in body.model_fields_set:
            raise invalid(f"{field} is for requests with examples", field)


async def _answer(
    state: AppState,
    access: AdapterAccess,
    body: GenerateAdapterBody,
    card: AdapterCard,
    report: Report,
) -> Response:
    agreement = await _agreement(state, access, card) if body.probe else None
    shown = {**shown_card(access, card, Seen.of(state), report), "base_agreement": agreement}
    return ORJSONResponse(shown, status=201, headers={"etag": f'"{card.etag}"'})


async def _agreement(state: AppState, access: AdapterAccess, card: AdapterCard) -> float | None:
    """None where the engine is too busy to be asked, or the adapter is gone again."""
    ref = NameRef(card.name, card.digest[:12])
    try:
        lease = await in_load_thread(state, lambda: state.store.acquire(ref), access)
    except ApiError:
        return None
    with lease:
        try:
            return round(await base_agreement(state.engine, state.text, lease), 4)
        except EngineError:
            return None
