"""The processes of a cluster, and which adapters each of them holds."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from loraplex_server.adapters.access import check_sees_all
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.cluster import ClusterAnswer
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.state import State

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/cluster", response_model=ClusterAnswer, responses=errors())
async def cluster(request: Request, state: State) -> Response:
    """Engine replicas with their queues and adapters by tier, and the processes that answer HTTP.

    ``cluster`` is null on a server that is one process.
    """
    check_sees_all(request)
    view = None if state.fleet is None else await state.fleet.view(state)
    return ORJSONResponse({"object": "cluster", "cluster": view})
