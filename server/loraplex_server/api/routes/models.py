"""/v1/models: the base, the sentence encoder and every adapter."""

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, JsonValue

from loraplex_adapter_store.names.card import AdapterCard
from loraplex_server.adapters.resolving.access import stored_name
from loraplex_server.adapters.resolving.sentence_encoder import EncoderModel
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.state import Access, AppState, State, followed, in_store_thread
from loraplex_server.errors import ApiError, not_found
from loraplex_server.settings.api_keys import AdapterAccess

router = APIRouter()


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
async def list_models(access: Access, state: State, loaded: bool = False) -> Response:
    """List the models. ``?loaded=true`` lists only adapters in host or device memory."""
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
    data += [_adapter(state, access, card) for card in cards]
    return ORJSONResponse({"object": "list", "data": data})


@router.get("/v1/models/{model_id:path}", response_model=Model, responses=errors(404))
async def show_model(model_id: str, access: Access, state: State) -> Response:
    if model_id in state.resolver.base_names:
        return ORJSONResponse(_base(state, model_id))
    if state.model.encoder is not None and model_id == state.model.encoder.name:
        return ORJSONResponse(_encoder(state, state.model.encoder))
    name = model_id
    for base in state.resolver.base_names:
        name = name.removeprefix(f"{base}:")
    await followed(state, access, name, param="model")
    name = stored_name(state.store, access, name, param="model")
    try:
        card = await in_store_thread(state, lambda: state.store.get(name), access)
    except ApiError as error:
        if error.status != 404:
            raise
        exists = await state.resolver.what_exists(access)
        raise not_found(
            f"model {model_id[:128]!r} does not exist; {exists}", "model", "model_not_found"
        ) from error
    return ORJSONResponse(_adapter(state, access, card))


def _base(state: AppState, name: str) -> dict[str, object]:
    card = _card(state, name, state.started, root=state.model.name, parent=None)
    return {**card, "quantization": state.store.base.quantization}


def _encoder(state: AppState, encoder: EncoderModel) -> dict[str, object]:
    """The encoder makes vectors alone; see docs/embeddings.md."""
    card = _card(state, encoder.name, state.started, root=encoder.name, parent=None)
    return {**card, "max_model_len": encoder.max_tokens}


def _adapter(state: AppState, access: AdapterAccess, card: AdapterCard) -> dict[str, object]:
    # The digest identifies the weights without a path of the server.
    parent = state.resolver.base_name
    root = f"sha256:{card.digest}"
    return _card(state, access.shown(card.name), int(card.created), root=root, parent=parent)


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
