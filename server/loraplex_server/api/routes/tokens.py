"""/tokenize and /detokenize, with vLLM's answers."""

from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.body import Body, Few, JsonObject, Name, TokenId, exactly_one_of
from loraplex_server.api.protocol.chat import ChatMessages
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.protocol.generation import AdapterBody
from loraplex_server.api.protocol.tools import Tools
from loraplex_server.api.serving.chat.chat_prompt import AdapterChat, ChatPrompt
from loraplex_server.api.serving.chat.image_sources import ImageSources
from loraplex_server.api.serving.chat.tool_use import tool_use
from loraplex_server.api.serving.unsupported import refuse_unsupported
from loraplex_server.api.state import Access, AppState, State, Tenant
from loraplex_server.errors import invalid
from loraplex_server.settings.api_keys import AdapterAccess

router = APIRouter(route_class=JsonRoute, tags=["Chats and texts"])


class TokenizeBody(AdapterBody):
    """A body with either ``prompt`` or ``messages``."""

    model_config = exactly_one_of(prompt="string", messages="array")

    prompt: str | None = None
    messages: ChatMessages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    tools: Tools | None = None
    return_token_strs: bool | None = None


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(Body):
    model: Name | None = None
    tokens: Annotated[Few[TokenId], Field(max_length=140_000)]


class Detokenized(BaseModel):
    prompt: str


@router.post("/tokenize", response_model=Tokenized, responses=errors(404, 415, 422))
async def tokenize(body: TokenizeBody, access: Access, state: State) -> Response:
    refuse_unsupported(body.model_extra or {})
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        (ids,) = await state.text.encode_many(
            [body.prompt], add_special_tokens=special, tenant=access.tenant or ""
        )
    else:
        ids = await _chat_ids(state, body, access)
    tokens = None
    if body.return_token_strs:
        tokens = [state.text.token_texts.get(token_id).text for token_id in ids]
    return ORJSONResponse(
        {
            "count": len(ids),
            "max_model_len": state.engine.max_model_len,
            "tokens": ids,
            "token_strs": tokens,
        }
    )


@router.post("/detokenize", response_model=Detokenized, responses=errors(415))
async def detokenize(body: DetokenizeBody, tenant: Tenant, state: State) -> Response:
    state.text.check_ids(body.tokens, "tokens")
    prompt = await state.text.decode(body.tokens, skip_special_tokens=False, tenant=tenant)
    return ORJSONResponse({"prompt": prompt})


async def _chat_ids(state: AppState, body: TokenizeBody, access: AdapterAccess) -> tuple[int, ...]:
    """Return the token ids of a chat's prompt, rendered with the template of its adapter."""
    assert body.messages is not None
    requested = state.resolver.parse(**body.adapter_fields)
    chat = ChatPrompt(
        body.messages,
        tools=tool_use(body.tools),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    resolved = await state.resolver.resolve(
        requested, chat.routing_text, access, takes_few_shot=True
    )
    try:
        tenant = access.tenant or ""
        sources = ImageSources(state, tenant)
        through = AdapterChat(chat, state.text, resolved, tenant, sources)
        ids, _ = await through.ids_within(state.engine.max_model_len)
        return ids
    finally:
        resolved.release()
