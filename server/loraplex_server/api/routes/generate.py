"""Text generation: chats, plain completions, Anthropic's Messages and OpenAI's Responses."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.chat import ChatBody, ChatCompletion
from loraplex_server.api.protocol.completion import Completion, CompletionBody
from loraplex_server.api.protocol.errors import AnthropicErrorBody, errors, with_events
from loraplex_server.api.protocol.messages import (
    CountedTokens,
    CountTokensBody,
    MessageAnswer,
    MessagesBody,
)
from loraplex_server.api.protocol.responses import DeletedResponse, ResponseAnswer, ResponsesBody
from loraplex_server.api.serving.chat.chat import answer_chat
from loraplex_server.api.serving.completion.completion import answer_completion
from loraplex_server.api.serving.messages.messages_call import answer_count, answer_message
from loraplex_server.api.serving.responses.replay import replayed
from loraplex_server.api.serving.responses.responses_call import answer_response
from loraplex_server.api.state import State, Tenant
from loraplex_server.errors import ApiError, not_found

router = APIRouter(route_class=JsonRoute, tags=["Chats and texts"])
_RESPONSES = with_events(errors(404, 415, 422, 499))
_ANTHROPIC_ERRORS = errors(404, 415, 422, 499, model=AnthropicErrorBody)
_ResponseId = Annotated[str, Path(max_length=128)]


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=_RESPONSES)
async def chat_completions(body: ChatBody, request: Request, state: State) -> Response:
    return await answer_chat(state, request, body)


@router.post("/v1/completions", response_model=Completion, responses=_RESPONSES)
async def completions(body: CompletionBody, request: Request, state: State) -> Response:
    return await answer_completion(state, request, body)


@router.post("/v1/messages", response_model=MessageAnswer, responses=with_events(_ANTHROPIC_ERRORS))
async def messages(body: MessagesBody, request: Request, state: State) -> Response:
    return await answer_message(state, request, body)


@router.post("/v1/messages/count_tokens", response_model=CountedTokens, responses=_ANTHROPIC_ERRORS)
async def count_tokens(body: CountTokensBody, request: Request, state: State) -> Response:
    return await answer_count(state, request, body)


@router.post("/v1/responses", response_model=ResponseAnswer, responses=_RESPONSES)
async def responses(body: ResponsesBody, request: Request, state: State) -> Response:
    return await answer_response(state, request, body)


@router.get(
    "/v1/responses/{response_id}", response_model=ResponseAnswer, responses=with_events(errors(404))
)
async def kept_response(
    response_id: _ResponseId,
    tenant: Tenant,
    state: State,
    stream: bool = False,
    starting_after: Annotated[int, Query(ge=-1)] = -1,
) -> Response:
    """Return a stored response. With ``stream``, its events behind number ``starting_after``."""
    stored = state.responses.get(tenant, response_id)
    if stored is None:
        raise _not_stored(response_id)
    if stream:
        events = replayed(stored.body, starting_after)
        return Response(events, media_type="text/event-stream")
    return ORJSONResponse(stored.body)


@router.delete("/v1/responses/{response_id}", response_model=DeletedResponse, responses=errors(404))
async def delete_response(response_id: _ResponseId, tenant: Tenant, state: State) -> Response:
    if not state.responses.delete(tenant, response_id):
        raise _not_stored(response_id)
    return ORJSONResponse({"id": response_id, "object": "response", "deleted": True})


def _not_stored(id: str) -> ApiError:
    message = f"no response {id!r} is stored here: it expired, was deleted or was never stored"
    return not_found(message, "response_id", "response_not_found")
