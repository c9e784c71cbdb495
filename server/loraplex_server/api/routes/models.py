"""/v1/models: the base first, then every adapter, as OpenAI clients and vLLM's tools list them."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from loraplex_adapter_store.card import AdapterCard
from loraplex_server.adapters.access import access_of, check_allowed
from loraplex_server.api.errors import ApiError, not_found
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.state import AppState, in_store_thread, state_of

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request, loaded: bool = False) -> Response:
    """``?loaded=true``: only adapters in host or device memory."""
    services, access = state_of(request), access_of(request)
    resident = set(services.engine.stats().resident_adapters) if loaded else set()
    cards = [
        card
        for card in await in_store_thread(services, services.store.list)
        if access.allows(card.name) and (not loaded or card.n_bytes.host or card.digest in resident)
    ]
    data = [_base(services, name) for name in services.resolver.base_names]
    data += [_adapter(services, card) for card in cards]
    return ORJSONResponse({"object": "list", "data": data})


@router.get("/v1/models/{model_id:path}")
async def show_model(request: Request, model_id: str) -> Response:
    services, access = state_of(request), access_of(request)
    if model_id in services.resolver.base_names:
        return ORJSONResponse(_base(services, model_id))
    name = model_id
    for base in services.resolver.base_names:
        name = name.removeprefix(f"{base}:")
    check_allowed(access, name, param="model")
    try:
        card = await in_store_thread(services, lambda: services.store.get(name))
    except ApiError as error:
        exists = await services.resolver.what_exists(access)
        raise not_found(
            f"model {model_id[:128]!r} does not exist; {exists}", "model", "model_not_found"
        ) from error
    return ORJSONResponse(_adapter(services, card))


def _base(services: AppState, name: str) -> dict[str, object]:
    return _card(services, name, services.started, root=services.model_root, parent=None)


def _adapter(services: AppState, card: AdapterCard) -> dict[str, object]:
    # The digest says which weights these are and gives no path of the server away.
    parent = services.resolver.base_name
    root = f"sha256:{card.digest}"
    return _card(services, card.name, int(card.created), root=root, parent=parent)


def _card(
    services: AppState, name: str, created: int, *, root: str, parent: str | None
) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "loraplex",
        "root": root,
        "parent": parent,
        "max_model_len": services.engine.max_model_len,
        "permission": [],
    }
