"""OpenAI's Responses API."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from loraplex_server.api.errors import ApiError, not_found
from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.errors import errors, with_events
from loraplex_server.api.protocol.responses import DeletedResponse, ResponseAnswer, ResponsesBody
from loraplex_server.api.request_info import info_of
from loraplex_server.api.serving.responses_call import ResponsesCall
from loraplex_server.api.state import State

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)
_Id = Annotated[str, Path(max_length=128)]


@router.post(
    "/v1/responses",
    response_model=ResponseAnswer,
    responses=with_events(errors(404, 415, 422, 499)),
)
async def responses(body: ResponsesBody, request: Request, state: State) -> Response:
    return await ResponsesCall(state, request, body).respond()


@router.get("/v1/responses/{response_id}", response_model=ResponseAnswer, responses=errors(404))
async def kept_response(response_id: _Id, request: Request, state: State) -> Response:
    kept = state.responses.get(info_of(request.scope).tenant, response_id)
    if kept is None:
        raise _not_kept(response_id)
    return ORJSONResponse(kept.body)


@router.delete("/v1/responses/{response_id}", response_model=DeletedResponse, responses=errors(404))
async def delete_response(response_id: _Id, request: Request, state: State) -> Response:
    if not state.responses.delete(info_of(request.scope).tenant, response_id):
        raise _not_kept(response_id)
    return ORJSONResponse({"id": response_id, "object": "response", "deleted": True})


def _not_kept(id: str) -> ApiError:
    told = f"no response {id!r} is kept here: it expired, was deleted or never was"
    return not_found(told, "response_id", "response_not_found")
