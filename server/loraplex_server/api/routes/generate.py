"""Text generation: chat, plain completions, and a clear no for embeddings."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from loraplex_server.api.errors import ApiError
from loraplex_server.api.openapi import body_of
from loraplex_server.api.protocol.generation import ChatBody, CompletionBody
from loraplex_server.api.serving.call import answer
from loraplex_server.api.serving.chat import ChatCall
from loraplex_server.api.serving.completion import CompletionCall
from loraplex_server.api.state import state_of

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=body_of(ChatBody))
async def chat_completions(request: Request) -> Response:
    services = state_of(request)
    body = await services.parser.parse(request, ChatBody)
    return await answer(ChatCall(services, request, body), body, request, services)


@router.post("/v1/completions", openapi_extra=body_of(CompletionBody))
async def completions(request: Request) -> Response:
    services = state_of(request)
    body = await services.parser.parse(request, CompletionBody)
    return await answer(CompletionCall(services, request, body), body, request, services)


@router.post("/v1/embeddings")
async def embeddings() -> Response:
    raise ApiError(
        404,
        "this server generates text; it has no embedding model",
        code="embeddings_not_supported",
        param="model",
    )
