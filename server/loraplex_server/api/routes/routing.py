"""Explains routing without generating: request → adapter, token → experts."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from loraplex_router.experts import ExpertLoad
from loraplex_server.adapters.access import access_of, check_owned
from loraplex_server.api.adapter_path import AdapterName
from loraplex_server.api.errors import invalid
from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.protocol.routing import ExpertRouting, Route, RouteBody
from loraplex_server.api.serving.messages import plain_messages, routing_text
from loraplex_server.api.state import State, in_store_thread

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/route", response_model=Route, responses=errors(415))
async def route(body: RouteBody, request: Request, state: State) -> Response:
    """Which adapter ``auto`` would choose for ``input`` or ``messages``, and why."""
    semantic = state.semantic
    if semantic is None:
        raise invalid("semantic routing is not enabled on this server", None, "feature_not_enabled")
    if (body.input is None) == (body.messages is None):
        raise invalid("give either 'input' or 'messages'", "input")
    if body.messages is not None:
        text = routing_text(plain_messages(body.messages))
    else:
        text = body.input or ""
    access = access_of(request)
    decision = await semantic.choose(text, access.candidates, with_tools=bool(body.tools))
    told = decision.to_json(access.shown)
    return ORJSONResponse({"object": "route", "method": "auto", **told})


@router.get("/v1/adapters/{name:path}/routing", response_model=ExpertRouting, responses=errors(404))
async def expert_routing(
    request: Request,
    name: AdapterName,
    state: State,
    window_s: Annotated[float, Query(gt=0, le=600, allow_inf_nan=False)] = 60.0,
) -> Response:
    """Rows per expert of each routed place over the last ``window_s`` seconds."""
    access = access_of(request)
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
