"""Answers calls of Anthropic's Messages API by chats."""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from loraplex_adapter_store.files.json_size import check_depth
from loraplex_server.api.orjson_response import ORJSONResponse, anthropic_error
from loraplex_server.api.protocol.chat import ChatBody
from loraplex_server.api.protocol.messages import CountTokensBody, MessagesBody
from loraplex_server.api.serving.chat.chat import ChatSource
from loraplex_server.api.serving.chat.message_parser import AnswerPieces, MessagePiece, ParserSpec
from loraplex_server.api.serving.disconnect import unless_client_leaves
from loraplex_server.api.serving.text_generation.answer_head import AnswerHead
from loraplex_server.api.serving.text_generation.choice import ChoiceOutput
from loraplex_server.api.serving.text_generation.generation import Usage
from loraplex_server.api.serving.text_generation.structured_output import requested_json
from loraplex_server.api.serving.text_generation.text_call import TextApi, TextCall
from loraplex_server.api.serving.unsupported import refuse_parts
from loraplex_server.api.state import AppState
from loraplex_server.api.streaming.sse import SseForm, sse_event
from loraplex_server.errors import invalid

from .anthropic_chat import chat_of_count, chat_of_messages

_SSE = SseForm(
    ping=sse_event("ping", b'{"type":"ping"}'),
    end=b"",  # message_stop is the last event
    error=lambda error: sse_event("error", anthropic_error(error)),
)
_API = TextApi("msg_", "messages", sse=_SSE)
Block = dict[str, Any]  # a content block; ``input`` is a text until the block is whole
# kind of a piece → type of its block, of its deltas, and the field that grows
_FORMS = {
    "content": ("text", "text_delta", "text"),
    "reasoning": ("thinking", "thinking_delta", "thinking"),
    "call": ("tool_use", "input_json_delta", "input"),
}


async def answer_message(state: AppState, request: Request, body: MessagesBody) -> Response:
    """Answer in Anthropic's format, streamed or whole. Raises ApiError."""
    chat = chat_of_messages(body)
    call = TextCall(state, request, chat, _API)
    source = ChatSource(call, chat, MessagesFormat)
    state.unknown_fields.warn(body.model_extra or ())
    form, param = body.output_format, "output_format"
    if body.output_config is not None and body.output_config.format is not None:
        if form is not None:
            raise invalid("output_format and output_config exclude each other", param)
        form, param = body.output_config.format, "output_config.format"
    if form is not None:
        refuse_parts(form, param)
        call.grammar = requested_json(f"{param}.schema", form.schema_)
    return await call.respond(source)


async def answer_count(state: AppState, request: Request, body: CountTokensBody) -> Response:
    """Count the tokens of a prompt; generate nothing. Raises ApiError."""
    chat = chat_of_count(body)
    call = TextCall(state, request, chat, _API)
    counted = _counted(call, ChatSource(call, chat, MessagesFormat))
    return ORJSONResponse(await unless_client_leaves(counted, request.receive))


async def _counted(call: TextCall[ChatBody], source: ChatSource) -> dict[str, int]:
    resolved = await call.resolve(source)
    try:
        ids, _ = await source.prompt_ids(source.through(resolved))
        return {"input_tokens": len(ids)}
    finally:
        resolved.release()


class MessagesFormat:
    """Writes one answer. Blocks open and close as the pieces arrive; an empty answer has none."""

    def __init__(self, head: AnswerHead, parser: ParserSpec | None) -> None:
        self._head = head
        self._pieces = AnswerPieces(parser)
        self._started = False
        self._blocks: list[Block] = []
        self._call = -1  # number of the last call

    def chunks(self, output: ChoiceOutput, usage: Usage) -> bytes:
        out = b"" if self._started else self._start(usage)
        out += self._add(output)
        if output.finish_reason is not None:
            if self._blocks:
                out += self._close()
            stop = self._stop(output.finish_reason, output.stop_reason)
            out += _event("message_delta", delta=stop, usage=_usage(usage))
            out += _event("message_stop")
        return out

    def usage_chunk(self, usage: Usage) -> bytes:
        return b""  # message_delta has the usage

    def body(self, choices: Sequence[ChoiceOutput], usage: Usage) -> bytes:
        (choice,) = choices
        assert choice.finish_reason is not None
        self._add(choice)
        stop = self._stop(choice.finish_reason, choice.stop_reason)
        for block in self._blocks:
            if block["type"] == "tool_use":
                block["input"] = _object(block["input"])
        return orjson.dumps(self._message(self._blocks, stop, usage))

    def _add(self, output: ChoiceOutput) -> bytes:
        out = b""
        for piece in self._pieces.of(output):
            kind, delta_kind, grows = _FORMS[piece.kind]
            if not self._continues(piece, kind):
                if self._blocks:
                    out += self._close()
                out += self._open(piece, kind)
            self._blocks[-1][grows] += piece.text
            if piece.text:
                field = "partial_json" if piece.kind == "call" else grows
                grown = {"type": delta_kind, field: piece.text}
                out += _event("content_block_delta", index=self._at, delta=grown)
        return out

    def _continues(self, piece: MessagePiece, kind: str) -> bool:
        if not self._blocks or self._blocks[-1]["type"] != kind:
            return False
        return piece.kind != "call" or piece.number == self._call

    def _open(self, piece: MessagePiece, kind: str) -> bytes:
        if piece.kind == "call":
            self._call = piece.number
            block: Block = {"type": kind, "id": piece.id, "name": piece.name, "input": ""}
        elif piece.kind == "reasoning":
            block = {"type": kind, "thinking": "", "signature": ""}
        else:
            block = {"type": kind, "text": ""}
        self._blocks.append(block)
        shown = {**block, "input": {}} if piece.kind == "call" else block
        return _event("content_block_start", index=self._at, content_block=shown)

    def _close(self) -> bytes:
        return _event("content_block_stop", index=self._at)

    @property
    def _at(self) -> int:
        return len(self._blocks) - 1

    def _stop(self, finish_reason: str, stop_reason: str | int | None) -> dict[str, object]:
        if finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if isinstance(stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
        reason = "end_turn" if self._call < 0 else "tool_use"
        return {"stop_reason": reason, "stop_sequence": None}

    def _start(self, usage: Usage) -> bytes:
        self._started = True
        stop = {"stop_reason": None, "stop_sequence": None}
        message = self._message([], stop, usage._replace(n_output=0))
        return _event("message_start", message=message)

    def _message(
        self, content: Sequence[object], stop: Mapping[str, object], usage: Usage
    ) -> dict[str, object]:
        return {
            "id": self._head.id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": content,
            **stop,
            "usage": _usage(usage),
            **self._head.extras(),
        }


def _event(kind: str, **fields: object) -> bytes:
    return sse_event(kind, orjson.dumps({"type": kind, **fields}))


def _object(arguments: str) -> dict[str, object]:
    """Parse arguments. Malformed ones, which may have been cut off, become ``{}``."""
    try:
        check_depth(arguments)
        value = orjson.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.n_prompt - usage.n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.n_cached,
        "output_tokens": usage.n_output,
    }
