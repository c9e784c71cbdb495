"""Text generation: chat, plain completions, and a clear no for embeddings."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from ..call import answer
from ..chat_call import ChatCall
from ..completion_call import CompletionCall
from ..errors import ApiError
from ..openapi import body_of
from ..services import services_of
from ..wire import ChatBody, CompletionBody

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=body_of(ChatBody))
async def chat_completions(request: Request) -> Response:
    services = services_of(request)
    body = await services.parser.parse(request, ChatBody)
    return await answer(ChatCall(services, request, body), body, request, services)


@router.post("/v1/completions", openapi_extra=body_of(CompletionBody))
async def completions(request: Request) -> Response:
    services = services_of(request)
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
