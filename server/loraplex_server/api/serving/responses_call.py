"""A call of OpenAI's Responses API, answered by a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from starlette.requests import Request

from loraplex_server.adapters.resolver import ResolvedAdapter
from loraplex_server.api.errors import ApiError, invalid, not_found
from loraplex_server.api.protocol.body import JsonObject
from loraplex_server.api.protocol.responses import ResponsesBody, TextFormat
from loraplex_server.api.request_info import info_of
from loraplex_server.api.state import AppState
from loraplex_server.api.streaming.sse import OPENAI_SSE, SseForm

from .call import AnswerFormat, Prompt
from .chat import ChatCall
from .chat_format import AnswerHead
from .response_store import KeptResponse
from .responses_chat import chat_of_response, messages_of_input
from .responses_format import ResponsesFormat, stream_error
from .structured_output import Wanted, json_wanted

__all__ = ["ResponsesCall"]


class ResponsesCall(ChatCall):
    id_prefix = "resp_"
    prompt_param = "input"
    limit_shown = "max_output_tokens"

    def __init__(self, state: AppState, request: Request, body: ResponsesBody) -> None:
        """Raises ApiError."""
        tenant = info_of(request.scope).tenant
        self._conversation = [
            *_conversation_before(state, tenant, body.previous_response_id),
            *messages_of_input(body.input),
        ]
        super().__init__(state, request, chat_of_response(body, self._conversation))
        state.unknown_fields.warn(body.model_extra or ())
        self._responses = body
        self._form: ResponsesFormat | None = None
        self._keeps = state.responses.max_bytes > 0 if body.store is None else body.store
        if self._keeps and not state.responses.max_bytes:
            raise invalid("this server keeps no responses; send store: false", "store")
        if body.text is not None and body.text.format is not None:
            self.wanted = _wanted(body.text.format)

    @property
    def sse_form(self) -> SseForm:
        return SseForm(OPENAI_SSE.ping, b"", self._error)

    async def prompts(self, resolved: ResolvedAdapter) -> Sequence[Prompt]:
        try:
            return await super().prompts(resolved)
        except ApiError as error:
            if error.param == "messages":
                error.param = self.prompt_param
            raise

    def format(self, head: AnswerHead) -> AnswerFormat:
        def keep(body: bytes, output: Sequence[JsonObject]) -> None:
            if self._keeps:
                told = [*self._conversation, *_told(output)]
                kept = KeptResponse(body, orjson.dumps(told))
                self.state.responses.keep(self.info.tenant, head.id, kept)

        texts = self.state.text.token_texts
        self._form = ResponsesFormat(head, texts, self._parser, self._echo(), keep)
        return self._form

    def _error(self, error: ApiError) -> bytes:
        return stream_error(error, 0 if self._form is None else self._form.n_events)

    def _echo(self) -> dict[str, Any]:
        body = self._responses
        choice = body.tool_choice or "auto"
        text = None if body.text is None else body.text.format
        shown: dict[str, object] = {"type": "text"}
        if text is not None:
            shown = text.model_dump(by_alias=True, exclude_none=True)
        return {
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "previous_response_id": body.previous_response_id,
            "store": self._keeps,
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
    if id is None:
        return []
    kept = state.responses.get(tenant, id)
    if kept is None:
        raise not_found(
            f"no response {id!r} is kept here; send the conversation as input",
            "previous_response_id",
            "previous_response_not_found",
        )
    messages: list[JsonObject] = orjson.loads(kept.conversation)
    return messages


def _told(output: Sequence[JsonObject]) -> list[JsonObject]:
    """Calls that were cut off are not part of it; an answer without anything is an empty turn."""
    whole = [item for item in output if item["status"] == "completed" or "content" in item]
    try:
        return messages_of_input(whole)
    except ApiError:  # nothing but thoughts, or arguments that are no object
        return [{"role": "assistant", "content": ""}]


def _wanted(format_: TextFormat) -> Wanted | None:
    """Raises ApiError (400)."""
    if format_.type == "text":
        return None
    if format_.type == "json_object":
        return json_wanted("text.format", {"type": "object"})
    if format_.schema_ is None:
        raise invalid("a format of type 'json_schema' needs a schema", "text.format.schema")
    return json_wanted("text.format.schema", format_.schema_, lenient=format_.strict is False)
