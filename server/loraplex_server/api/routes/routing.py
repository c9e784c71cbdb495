"""Where things go, told without doing them: request → adapter, token → experts."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from loraplex_router.experts import ExpertLoad
from loraplex_server.adapters.access import AdapterName, access_of
from loraplex_server.adapters.semantic_router import SemanticRouter
from loraplex_server.api.errors import invalid
from loraplex_server.api.openapi import body_of
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.generation import RouteBody
from loraplex_server.api.protocol.messages import plain_messages, routing_text
from loraplex_server.api.state import in_store_thread, state_of
from loraplex_server.engine.expert_monitor import ExpertMonitor

__all__ = ["router"]

router = APIRouter()

_MAX_WINDOW_S = 600.0


@router.post("/v1/route", openapi_extra=body_of(RouteBody))
async def route(request: Request) -> Response:
    """Which adapter ``auto`` would choose for ``input`` or ``messages``, and why."""
    services = state_of(request)
    body = await services.parser.parse(request, RouteBody)
    semantic = request.app.state.semantic
    if not isinstance(semantic, SemanticRouter):
        raise invalid("semantic routing is not enabled on this server", None, "feature_not_enabled")
    if (body.input is None) == (body.messages is None):
        raise invalid("give either 'input' or 'messages'", "input")
    if body.messages is not None:
        if not body.messages:
            raise invalid("messages must not be empty", "messages")
        text = routing_text(plain_messages(body.messages))
    else:
        text = body.input or ""
    decision = await semantic.choose(text, access_of(request))
    return ORJSONResponse({"object": "route", "method": "auto", **decision.to_json()})


@router.get("/v1/adapters/{name:path}/routing")
async def expert_routing(request: Request, name: AdapterName, window_s: float = 60.0) -> Response:
    """Rows per expert of each routed place over the last ``window_s`` seconds."""
    services = state_of(request)
    if not 0 < window_s <= _MAX_WINDOW_S:
        raise invalid(f"window_s must be above 0 and at most {_MAX_WINDOW_S:g}", "window_s")
    card = await in_store_thread(services, lambda: services.store.get(name), access_of(request))
    monitor = request.app.state.experts
    load = monitor.load(card.digest, window_s) if isinstance(monitor, ExpertMonitor) else None
    return ORJSONResponse(
        {
            "object": "adapter.routing",
            "name": card.name,
            "digest": card.digest,
            "family": card.family.value,
            **(load or ExpertLoad({}, 0.0)).to_json(),
        }
    )
