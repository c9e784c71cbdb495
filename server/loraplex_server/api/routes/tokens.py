"""/tokenize and /detokenize, as vLLM answers them."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from loraplex_server.adapters.access import access_of
from loraplex_server.api.errors import invalid
from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.protocol.tokens import (
    DetokenizeBody,
    Detokenized,
    TokenizeBody,
    Tokenized,
)
from loraplex_server.api.serving.chat_prompt import ChatPrompt, defaults_of
from loraplex_server.api.serving.tool_use import tool_use
from loraplex_server.api.state import AppState, State
from loraplex_server.api_keys import AdapterAccess

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize", response_model=Tokenized, responses=errors(404, 415, 422))
async def tokenize(body: TokenizeBody, request: Request, state: State) -> Response:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        ids = await state.text.encode(body.prompt, add_special_tokens=special)
    else:
        ids = await _chat_ids(state, body, access_of(request))
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
async def detokenize(body: DetokenizeBody, state: State) -> Response:
    state.text.check_ids(body.tokens, "tokens")
    return ORJSONResponse(
        {"prompt": await state.text.decode(body.tokens, skip_special_tokens=False)}
    )


async def _chat_ids(state: AppState, body: TokenizeBody, access: AdapterAccess) -> tuple[int, ...]:
    """Those that a chat through the same adapter would begin with."""
    assert body.messages is not None
    asked = state.resolver.parse(model=body.model, adapter=body.adapter)
    chat = ChatPrompt(
        body.messages,
        tools=tool_use(body.tools),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    chosen = await state.resolver.resolve(asked, chat.routing_text, access, takes_turns=True)
    try:
        defaults = defaults_of(chosen)
        protocol = chat.protocol(state.text, chosen, defaults)
        ids, _ = await chat.ids_within(
            state.engine.max_model_len,
            state.text,
            protocol,
            defaults,
            tenant=access.tenant or "",
            turns=chosen.turns,
        )
        return ids
    finally:
        chosen.release()
