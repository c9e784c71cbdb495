"""Text generation: chat and plain completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.protocol.chat import ChatBody, ChatCompletion
from loraplex_server.api.protocol.completion import Completion, CompletionBody
from loraplex_server.api.protocol.errors import errors, with_events
from loraplex_server.api.serving.chat import ChatCall
from loraplex_server.api.serving.completion import CompletionCall
from loraplex_server.api.state import State

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)
_RESPONSES = with_events(errors(404, 415, 422, 499))


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=_RESPONSES)
async def chat_completions(body: ChatBody, request: Request, state: State) -> Response:
    return await ChatCall(state, request, body).respond()


@router.post("/v1/completions", response_model=Completion, responses=_RESPONSES)
async def completions(body: CompletionBody, request: Request, state: State) -> Response:
    return await CompletionCall(state, request, body).respond()
