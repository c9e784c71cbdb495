"""Answers calls of OpenAI's Responses API by chats."""

from collections.abc import Sequence
from dataclasses import replace

import orjson
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.api.protocol.body import JsonObject
from loraplex_server.api.protocol.responses import ResponsesBody, TextFormat
from loraplex_server.api.request_info import info_of
from loraplex_server.api.serving.chat.chat import ChatSource
from loraplex_server.api.serving.chat.message_parser import ParserSpec
from loraplex_server.api.serving.text_generation.answer_head import AnswerHead
from loraplex_server.api.serving.text_generation.structured_output import (
    RequestedGrammar,
    requested_json,
)
from loraplex_server.api.serving.text_generation.text_call import TextApi, TextCall
from loraplex_server.api.serving.unsupported import refuse_parts
from loraplex_server.api.state import AppState
from loraplex_server.api.streaming.sse import OPENAI_SSE, SseForm
from loraplex_server.errors import ApiError, invalid, not_found

from .response_store import StoredResponse
from .responses_chat import chat_of_response, messages_of_input
from .responses_format import EventWriter, ResponsesFormat

_API = TextApi("resp_", "input", "max_output_tokens")


async def answer_response(state: AppState, request: Request, body: ResponsesBody) -> Response:
    """Answer in the format of responses, streamed or whole. Raises ApiError."""
    tenant = info_of(request.scope).tenant
    conversation = [
        *_conversation_before(state, tenant, body.previous_response_id),
        *messages_of_input(body.input),
    ]
    chat = chat_of_response(body, conversation)
    events = EventWriter()
    api = replace(_API, sse=SseForm(OPENAI_SSE.ping, b"", events.error))
    call = TextCall(state, request, chat, api)
    stores = state.responses.max_bytes > 0 if body.store is None else body.store

    def store(id: str, answer: bytes, output: Sequence[JsonObject]) -> None:
        if stores:
            messages = orjson.dumps([*conversation, *_messages_of_output(output)])
            state.responses.store(tenant, id, StoredResponse(answer, messages))

    def new_format(head: AnswerHead, parser: ParserSpec | None) -> ResponsesFormat:
        request_fields = _request_fields(body, stores=stores)
        return ResponsesFormat(head, state.text.token_texts, parser, events, request_fields, store)

    source = ChatSource(call, chat, new_format)
    state.unknown_fields.warn(body.model_extra or ())
    if stores and not state.responses.max_bytes:
        raise invalid("this server stores no responses; send store: false", "store")
    if body.text is not None and body.text.format is not None:
        call.grammar = _grammar(body.text.format)
    return await call.respond(source)


def _request_fields(body: ResponsesBody, *, stores: bool) -> dict[str, object]:
    """Return the fields of the request that its answer repeats."""
    choice = body.tool_choice or "auto"
    text = None if body.text is None else body.text.format
    shown: dict[str, object] = {"type": "text"}
    if text is not None:
        shown = text.model_dump(by_alias=True, exclude_none=True)
    return {
        "instructions": body.instructions,
        "metadata": body.metadata or {},
        "previous_response_id": body.previous_response_id,
        "store": stores,
        "max_output_tokens": body.max_output_tokens,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "text": {"format": shown},
        "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "top_logprobs": body.top_logprobs,
        "truncation": "disabled",
        "background": False,
    }


def _conversation_before(state: AppState, tenant: str, id: str | None) -> list[JsonObject]:
    """Return the messages of the previous response. Raises ApiError (404)."""
    if id is None:
        return []
    stored = state.responses.get(tenant, id)
    if stored is None:
        raise not_found(
            f"no response {id!r} is stored here; send the conversation as input",
            "previous_response_id",
            "previous_response_not_found",
        )
    messages: list[JsonObject] = orjson.loads(stored.conversation)
    return messages


def _messages_of_output(output: Sequence[JsonObject]) -> list[JsonObject]:
    """Leave out calls that were cut off. An empty answer is an empty turn."""
    whole = [item for item in output if item["status"] == "completed" or "content" in item]
    try:
        return messages_of_input(whole)
    except ApiError:  # only reasoning, or arguments that are no object
        return [{"role": "assistant", "content": ""}]


def _grammar(format_: TextFormat) -> RequestedGrammar | None:
    """Return the grammar of a text format, if any. Raises ApiError (400)."""
    if format_.type == "text":
        return None
    refuse_parts(format_, "text.format")
    if format_.type == "json_object":
        return requested_json("text.format", {"type": "object"})
    if format_.schema_ is None:
        raise invalid("a format of type 'json_schema' needs a schema", "text.format.schema")
    return requested_json("text.format.schema", format_.schema_, lenient=format_.strict is False)
