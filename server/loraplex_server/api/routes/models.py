"""/v1/models: the base, the sentence encoder and every adapter."""

from datetime import UTC, datetime
from typing import Annotated, Literal, cast

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, JsonValue

from loraplex_adapter_store.names.card import AdapterCard
from loraplex_adapter_store.names.selector import Auto, NameRef, Selector
from loraplex_server.adapters.resolving.access import stored_name
from loraplex_server.adapters.resolving.sentence_encoder import EncoderModel
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.request_info import is_anthropic
from loraplex_server.api.state import Access, AppState, State, followed, in_store_thread
from loraplex_server.errors import ApiError, not_found
from loraplex_server.settings.api_keys import AdapterAccess

router = APIRouter(tags=["Models"])


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    quantization: str | None = None  # of the base's linears, as "int8"
    permission: list[JsonValue]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


@router.get("/v1/models", response_model=ModelList, responses=errors())
async def list_models(
    request: Request,
    access: Access,
    state: State,
    loaded: bool = False,
    limit: Annotated[int | None, Query(ge=1, le=1000)] = None,
    after_id: str | None = None,
    before_id: str | None = None,
) -> Response:
    """List the models. ``?loaded=true`` lists only adapters in host or device memory.

    ``limit``, ``after_id`` and ``before_id`` make pages, as Anthropic's clients ask for them. With
    their header ``anthropic-version``, the answer has Anthropic's form.
    """
    resident = set(state.engine.stats().resident_adapters) if loaded else set()
    cards = [
        card
        for card in access.listed(await in_store_thread(state, state.store.list, access))
        if (
            not loaded
            or card.n_bytes.host
            or card.digest in resident
            or not access.owns(card.name)  # the use of shared adapters is not shown
        )
    ]
    data = [_base(state, name) for name in state.resolver.base_names]
    if state.model.encoder is not None:
        data.append(_encoder(state, state.model.encoder))
    data += [_adapter(state, access.shown(card.name), card) for card in cards]
    return _listed(request, data, limit, after_id, before_id)


@router.get("/v1/models/{model_id:path}", response_model=Model, responses=errors(404))
async def show_model(model_id: str, request: Request, access: Access, state: State) -> Response:
    """Show a model by any name that requests may have in ``model``."""
    if state.model.encoder is not None and model_id == state.model.encoder.name:
        return _shown(request, _encoder(state, state.model.encoder))
    asked = state.resolver.parse(model=model_id)
    if asked.selector is None and not asked.is_unknown:
        return _shown(request, _base(state, model_id))
    if isinstance(asked.selector, Auto) and state.semantic is not None:
        root = state.resolver.base_name
        return _shown(request, _card(state, model_id, state.started, root=root, parent=root))
    card = await _card_of(state, access, asked.selector)
    if card is None:
        exists = await state.resolver.what_exists(access)
        raise not_found(
            f"model {model_id[:128]!r} does not exist; {exists}", "model", "model_not_found"
        )
    return _shown(request, _adapter(state, model_id, card))


async def _card_of(
    state: AppState, access: AdapterAccess, selector: Selector | None
) -> AdapterCard | None:
    """Return the revision that a name, or a name with a digest, means. Raises ApiError (403)."""
    if not isinstance(selector, NameRef):
        return None
    await followed(state, access, selector.name, param="model")
    name = stored_name(state.store, access, selector.name, param="model")
    try:
        cards = await in_store_thread(state, lambda: state.store.revisions(name), access)
    except ApiError as error:
        if error.status != 404:
            raise
        return None
    digest = selector.digest_prefix or ""
    return next((card for card in cards if card.digest.startswith(digest)), None)


def _listed(
    request: Request,
    data: list[dict[str, object]],
    limit: int | None,
    after_id: str | None,
    before_id: str | None,
) -> Response:
    """Return a page of the list, in the form of the client's API."""
    ids = [model["id"] for model in data]
    first = ids.index(after_id) + 1 if after_id in ids else 0
    end = ids.index(before_id) if before_id in ids else len(ids)
    if limit is not None:
        first, end = (max(0, end - limit), end) if before_id in ids else (first, first + limit)
    page = data[first:end]
    if not is_anthropic(request):
        return ORJSONResponse({"object": "list", "data": page})
    return ORJSONResponse(
        {
            "data": [_as_anthropic(model) for model in page],
            "has_more": first > 0 if before_id in ids else end < len(ids),
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
        }
    )


def _shown(request: Request, model: dict[str, object]) -> Response:
    return ORJSONResponse(_as_anthropic(model) if is_anthropic(request) else model)


def _as_anthropic(model: dict[str, object]) -> dict[str, object]:
    created = datetime.fromtimestamp(cast(int, model["created"]), UTC)
    return {
        "type": "model",
        "id": model["id"],
        "display_name": model["id"],
        "created_at": created.isoformat().replace("+00:00", "Z"),
    }


def _base(state: AppState, name: str) -> dict[str, object]:
    card = _card(state, name, state.started, root=state.model.name, parent=None)
    return {**card, "quantization": state.store.base.quantization}


def _encoder(state: AppState, encoder: EncoderModel) -> dict[str, object]:
    """The encoder makes vectors alone; see docs/embeddings.md."""
    card = _card(state, encoder.name, state.started, root=encoder.name, parent=None)
    return {**card, "max_model_len": encoder.max_tokens}


def _adapter(state: AppState, name: str, card: AdapterCard) -> dict[str, object]:
    # The digest identifies the weights without a path of the server.
    parent = state.resolver.base_name
    root = f"sha256:{card.digest}"
    return _card(state, name, int(card.created), root=root, parent=parent)


def _card(
    state: AppState, name: str, created: int, *, root: str, parent: str | None
) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "loraplex",
        "root": root,
        "parent": parent,
        "max_model_len": state.engine.max_model_len,
        "permission": [],
    }
