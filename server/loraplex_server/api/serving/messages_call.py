"""A call of Anthropic's Messages API, answered by a chat."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.messages import CountTokensBody, MessagesBody
from loraplex_server.api.state import AppState
from loraplex_server.api.streaming.sse import SseForm

from .anthropic_chat import chat_of_count, chat_of_messages
from .call import AnswerFormat
from .chat import ChatCall
from .chat_format import AnswerHead
from .chat_prompt import defaults_of
from .disconnect import unless_client_leaves
from .messages_format import ANTHROPIC_SSE, MessagesFormat
from .structured_output import json_wanted

__all__ = ["CountCall", "MessagesCall"]


class MessagesCall(ChatCall):
    id_prefix = "msg_"

    def __init__(self, state: AppState, request: Request, body: MessagesBody) -> None:
        """Raises ApiError."""
        super().__init__(state, request, chat_of_messages(body))
        state.unknown_fields.warn(body.model_extra or ())
        output = body.output_config
        if output is not None and output.format is not None:
            self.wanted = json_wanted("output_config.format.schema", output.format.schema_)

    @property
    def sse_form(self) -> SseForm:
        return ANTHROPIC_SSE

    def format(self, head: AnswerHead) -> AnswerFormat:
        return MessagesFormat(head, self._parser)


class CountCall(ChatCall):
    """Counts the tokens of a prompt; generates nothing."""

    def __init__(self, state: AppState, request: Request, body: CountTokensBody) -> None:
        """Raises ApiError."""
        super().__init__(state, request, chat_of_count(body))

    async def respond(self) -> Response:
        return ORJSONResponse(await unless_client_leaves(self._count(), self.request.receive))

    async def _count(self) -> dict[str, int]:
        resolved = await self.resolve()
        try:
            self.take_defaults(defaults_of(resolved))
            ids, _ = await self.prompt_ids(self.protocol(resolved), resolved.turns)
            return {"input_tokens": len(ids)}
        finally:
            resolved.release()
