"""POST /v1/adapters/generate: a description in, a registered adapter out."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.selector import NameRef
from loraplex_server.adapters.access import access_of, check_allowed, name_to_write
from loraplex_server.adapters.base_agreement import base_agreement
from loraplex_server.adapters.generated_adapters import AdapterGenerationRequest
from loraplex_server.api.adapter_card import Report, shown_card
from loraplex_server.api.errors import ApiError, invalid
from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.adapters import Adapter, GenerateAdapterBody
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.state import AppState, State, in_store_thread
from loraplex_server.api_keys import GENERATED
from loraplex_server.engine.errors import EngineError

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/adapters/generate",
    status_code=201,
    response_model=Adapter,
    responses=errors(404, 412, 415, 422),
)
async def generate_adapter(
    body: GenerateAdapterBody, request: Request, state: State, report: Report = "summary"
) -> Response:
    """The card says where the adapter came from: method, parts, scores, digests."""
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
        body.force,
    )
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
    agreement = await _agreement(state, card) if body.probe else None
    resident = set(state.engine.stats().resident_adapters)
    shown = {**shown_card(access, card, resident, report), "base_agreement": agreement}
    return ORJSONResponse(shown, status=201, headers={"etag": f'"{card.digest}"'})


async def _agreement(state: AppState, card: AdapterCard) -> float | None:
    """None where the engine is too busy to be asked, or the adapter is gone again."""
    ref = NameRef(card.name, card.digest[:12])
    try:
        lease = await in_store_thread(
            state, lambda: state.store.acquire(ref), pool=state.pools.loads
        )
    except ApiError:
        return None
    with lease:
        try:
            return round(await base_agreement(state.engine, state.text, lease), 4)
        except EngineError:
            return None
