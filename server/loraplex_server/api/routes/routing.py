"""Explains routing without generating: request → adapter, token → experts."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from loraplex_router.experts.load import ExpertLoad
from loraplex_server.adapters.resolving.access import check_owned
from loraplex_server.api.adapter_path import AdapterName
from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.body import Body, exactly_one_of
from loraplex_server.api.protocol.chat import ChatMessages
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.protocol.tools import Tools
from loraplex_server.api.serving.chat.chat_messages import plain_messages, routing_text
from loraplex_server.api.state import Access, State, in_store_thread
from loraplex_server.errors import invalid

router = APIRouter(route_class=JsonRoute, tags=["Adapters"])


class RouteBody(Body):
    """Either a text or chat messages, and the tools that the request offers."""

    model_config = exactly_one_of(input="string", messages="array")

    input: Annotated[str, Field(max_length=100_000)] | None = None
    messages: ChatMessages | None = None
    tools: Tools | None = None


class Route(BaseModel):
    """Further fields explain the choice: candidates, scores, threshold."""

    model_config = ConfigDict(extra="allow")

    object: Literal["route"]
    method: Literal["auto"]


class ExpertRouting(BaseModel):
    """Further fields hold the rows of each expert of each routed layer."""

    model_config = ConfigDict(extra="allow")

    object: Literal["adapter.routing"]
    name: str
    digest: str
    family: str


@router.post("/v1/route", response_model=Route, responses=errors(415))
async def route(body: RouteBody, access: Access, state: State) -> Response:
    """Explain which adapter ``auto`` chooses for ``input`` or ``messages``."""
    semantic = state.semantic
    if semantic is None:
        raise invalid("semantic routing is not enabled on this server", None, "feature_not_enabled")
    if (body.input is None) == (body.messages is None):
        raise invalid("give either 'input' or 'messages'", "input")
    if body.messages is not None:
        text = routing_text(plain_messages(body.messages))
    else:
        text = body.input or ""
    decision = await semantic.choose(
        text, access.candidates, tenant=access.tenant, with_tools=bool(body.tools)
    )
    shown = decision.to_json(access.shown)
    return ORJSONResponse({"object": "route", "method": "auto", **shown})


@router.get("/v1/adapters/{name:path}/routing", response_model=ExpertRouting, responses=errors(404))
async def expert_routing(
    name: AdapterName,
    access: Access,
    state: State,
    window_s: Annotated[float, Query(gt=0, le=600, allow_inf_nan=False)] = 60.0,
) -> Response:
    """Return the rows of each expert of each routed layer, over the last ``window_s`` seconds."""
    check_owned(access, name)
    card = await in_store_thread(state, lambda: state.store.get(name), access)
    load: ExpertLoad | None = None
    if state.fleet is not None:
        load = await state.fleet.expert_load(card.digest, window_s)
    elif state.experts is not None:
        load = state.experts.load(card.digest, window_s)
    return ORJSONResponse(
        {
            "object": "adapter.routing",
            "name": access.shown(card.name),
            "digest": card.digest,
            "family": card.family.value,
            **(load or ExpertLoad({}, 0.0)).to_json(),
        }
    )
