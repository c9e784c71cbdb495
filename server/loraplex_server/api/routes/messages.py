"""Anthropic's Messages API."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.protocol.errors import AnthropicErrorBody, errors, with_events
from loraplex_server.api.protocol.messages import (
    CountedTokens,
    CountTokensBody,
    MessageAnswer,
    MessagesBody,
)
from loraplex_server.api.serving.messages_call import CountCall, MessagesCall
from loraplex_server.api.state import State

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)
_ERRORS = errors(404, 415, 422, 499, model=AnthropicErrorBody)


@router.post("/v1/messages", response_model=MessageAnswer, responses=with_events(_ERRORS))
async def messages(body: MessagesBody, request: Request, state: State) -> Response:
    return await MessagesCall(state, request, body).respond()


@router.post("/v1/messages/count_tokens", response_model=CountedTokens, responses=_ERRORS)
async def count_tokens(body: CountTokensBody, request: Request, state: State) -> Response:
    return await CountCall(state, request, body).respond()
