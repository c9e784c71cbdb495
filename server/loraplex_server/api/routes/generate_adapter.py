"""POST /v1/adapters/generate: a description in, a registered adapter out."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.selector import NameRef
from loraplex_server.adapters.access import access_of, check_allowed
from loraplex_server.adapters.base_agreement import base_agreement
from loraplex_server.adapters.generated_adapters import (
    PREFIX,
    AdapterGenerationRequest,
    GeneratedAdapters,
)
from loraplex_server.api.errors import invalid
from loraplex_server.api.openapi import body_of
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.state import AppState, in_store_thread, state_of
from loraplex_server.engine.errors import EngineError

__all__ = ["GenerateAdapterBody", "router"]

router = APIRouter()

_Prompt = Annotated[str, Field(min_length=1, max_length=2000)]


class GenerateAdapterBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    description: Annotated[str, Field(min_length=1, max_length=2000)]
    examples: Annotated[list[str], Field(max_length=100)] = []  # further wordings of the wish
    prompts: Annotated[list[_Prompt], Field(max_length=64)] = []  # unlabelled inputs; icm-lora
    method: Literal[
        "auto", "end-to-end", "sg-lora", "icm-lora", "weighted", "nearest", "analogy"
    ] = "auto"
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    name: Annotated[str, Field(max_length=128)] | None = None
    ttl_s: Annotated[float, Field(gt=0, le=30 * 86400)] | None = None
    samples: Annotated[int, Field(ge=0, le=16)] = 0
    force: bool = False
    probe: bool = True  # measure the agreement with the base on unrelated prompts


@router.post("/v1/adapters/generate", openapi_extra=body_of(GenerateAdapterBody))
async def generate_adapter(request: Request) -> Response:
    """The card says where the adapter came from: method, parts, scores, digests."""
    services = state_of(request)
    services.lifecycle.check_admitting()
    body = await services.parser.parse(request, GenerateAdapterBody)
    adapters: GeneratedAdapters | None = getattr(request.app.state, "generated", None)
    if adapters is None:
        raise invalid(
            "adapter generation is not enabled on this server", None, "feature_not_enabled"
        )
    check_allowed(access_of(request), body.name or PREFIX, param="name")
    order = AdapterGenerationRequest(
        body.description.strip(),
        tuple(body.examples),
        tuple(body.prompts),
        body.method,
        body.seed,
        body.samples,
        body.force,
    )
    card = await in_store_thread(
        services, lambda: adapters.ensure(order, name=body.name, ttl_s=body.ttl_s)
    )
    agreement = await _agreement(services, card) if body.probe else None
    shown = {"object": "adapter", **card.to_json(), "base_agreement": agreement}
    return ORJSONResponse(shown, status=201, headers={"etag": f'"{card.digest}"'})


async def _agreement(services: AppState, card: AdapterCard) -> float | None:
    """None where the engine is too busy to be asked."""
    ref = NameRef(card.name, card.digest[:12])
    lease = await in_store_thread(services, lambda: services.store.acquire(ref))
    with lease:
        try:
            return round(await base_agreement(services.engine, services.text, lease), 4)
        except EngineError:
            return None
