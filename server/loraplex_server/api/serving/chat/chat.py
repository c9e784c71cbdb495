"""Answers chats: messages in, a running generation out."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import orjson
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.adapters.resolving.resolved_adapter import ResolvedAdapter
from loraplex_server.api.protocol.chat import ChatBody
from loraplex_server.api.serving.text_generation.answer_head import AnswerHead
from loraplex_server.api.serving.text_generation.choice import ChoiceOutput
from loraplex_server.api.serving.text_generation.generation import Usage
from loraplex_server.api.serving.text_generation.logprobs import chat_logprobs
from loraplex_server.api.serving.text_generation.sampling import (
    limited,
    max_output_tokens,
    sampling_params,
)
from loraplex_server.api.serving.text_generation.structured_output import RequestedGrammar
from loraplex_server.api.serving.text_generation.text_call import (
    AnswerFormat,
    PreparedCall,
    Prompt,
    TextApi,
    TextCall,
)
from loraplex_server.api.state import AppState
from loraplex_server.errors import ApiError, invalid
from loraplex_server.text.token_text import TokenTexts

from .chat_prompt import AdapterChat, ChatPrompt
from .image_sources import ImageSources
from .message_parser import AnswerPieces, MessagePiece, ParsedMessage, ParserSpec
from .structural_tags import StructuralTags
from .tool_grammar import PromptEnd, answer_grammar
from .tool_use import tool_use

CHAT_API = TextApi("chatcmpl-", "messages")
NewChatFormat = Callable[[AnswerHead, ParserSpec | None], AnswerFormat]
_TAIL_TOKENS = 16  # end of a prompt that shows whether it has opened the reasoning
_CHUNK = "chat.completion.chunk"
_NOTHING_BESIDE = (b"null", b"")


async def answer_chat(state: AppState, request: Request, body: ChatBody) -> Response:
    """Answer a chat, streamed or whole. Raises ApiError."""
    call = TextCall(state, request, body, CHAT_API)

    def new_format(head: AnswerHead, parser: ParserSpec | None) -> AnswerFormat:
        return ChatFormat(head, state.text.token_texts, parser)

    return await call.respond(ChatSource(call, body, new_format))


class _Reading(NamedTuple):
    """The constraint and the parser of a chat's answers."""

    grammar: RequestedGrammar | None
    parser: ParserSpec | None  # None: an answer is all content
    shows_special_tokens: bool = False


class ChatSource:
    """The prompt of a chat. Other APIs pass their own format for the answer."""

    takes_few_shot = True

    def __init__(self, call: TextCall[ChatBody], body: ChatBody, new_format: NewChatFormat) -> None:
        """Raises ApiError."""
        self._call = call
        self._new_format = new_format
        self._tools = tool_use(body.tools, body.tool_choice, parallel=body.parallel_tool_calls)
        self._prompt = ChatPrompt(
            body.messages,
            tools=self._tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=_template_kwargs(body),
        )
        self._limit_param = (
            "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        )
        self._limit = getattr(body, self._limit_param)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")

    @property
    def routing_text(self) -> str:
        return self._prompt.routing_text

    @property
    def offers_tools(self) -> bool:
        return bool(self._tools.tools)

    async def prompt_ids(self, chat: AdapterChat) -> tuple[tuple[int, ...], int]:
        """Return the prompt's ids and the number of the adapter's examples in it.

        Raises ApiError (400).
        """
        meter = self._call.info.meter
        n_tokens = self._call.state.engine.max_model_len
        if meter is not None and meter.most_tokens is not None:
            n_tokens = min(n_tokens, meter.most_tokens)
        ids, n_turns = await chat.ids_within(n_tokens, n_answer=self._limit)
        if not ids:
            raise invalid("the messages give an empty prompt", "messages")
        return ids, n_turns

    async def prepare(self, body: ChatBody, resolved: ResolvedAdapter) -> PreparedCall:
        api = self._call.api
        try:
            return await self._prepare(body, self.through(resolved))
        except ApiError as error:
            if error.param == "messages":
                error.param = api.prompt_param
            raise

    def through(self, resolved: ResolvedAdapter) -> AdapterChat:
        call = self._call
        sources = ImageSources(call.state, call.info.tenant)
        return AdapterChat(self._prompt, call.state.text, resolved, call.info.tenant, sources)

    async def _prepare(self, body: ChatBody, chat: AdapterChat) -> PreparedCall:
        state, api = self._call.state, self._call.api
        ids, n_turns = await self.prompt_ids(chat)
        reading = await self._reading(chat, ids)
        max_tokens = max_output_tokens(
            self._limit,
            default=chat.defaults.sampling.max_tokens,
            n_prompt=len(ids),
            max_model_len=state.engine.max_model_len,
            param=api.limit_param or self._limit_param,
            prompt_param=api.prompt_param,
        )
        n_top = body.prompt_logprobs
        sampling = await sampling_params(
            body,
            state.text,
            tenant=self._call.info.tenant,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=n_top,
        )
        return PreparedCall(
            [
                Prompt(
                    ids,
                    limited(sampling, max_tokens),
                    n_turns=n_turns,
                    images=chat.images_in(ids),
                )
            ],
            lambda head: self._new_format(head, reading.parser),
            reading.grammar,
            limits_output=self._limit is not None,
            with_logprobs=bool(body.logprobs),
            shows_special_tokens=reading.shows_special_tokens,
            prompt_logprobs={} if n_top is None else {"prompt_logprobs": n_top},
        )

    async def _reading(self, chat: AdapterChat, ids: Sequence[int]) -> _Reading:
        """Return how the answer is read and constrained. Raises ApiError (400)."""
        text, tools, markup = self._call.state.text, self._tools, chat.markup
        requested = self._call.grammar
        with_calls = bool(tools.tools)
        if not with_calls and markup.reasoning is None and markup.response_template is None:
            return _Reading(requested, None)
        tail = ids if markup.response_template is not None else ids[-_TAIL_TOKENS:]
        prompt = await text.decode(tail, skip_special_tokens=False, tenant=self._call.info.tenant)
        is_constrained = requested is not None or tools.constrained
        if is_constrained and markup.response_template is not None:
            choice = "tool_choice" if tools.required else "tools"
            raise invalid(
                "this adapter's own response_template reads its answers, so they cannot be held to "
                "a schema or a grammar. Ask with tool_choice 'auto' and without strict tools or a "
                "response format, or take response_template off the adapter's card",
                choice if requested is None else requested.param,
                "response_template_not_held",
            )
        markers = [*(markup.calls[:2] if with_calls else ()), *(markup.reasoning or ())]
        end = PromptEnd.of(prompt, markup.reasoning)
        tags = StructuralTags.of(
            markup,
            with_calls=with_calls,
            in_reasoning=end.in_reasoning,
            past_reasoning=end.past_reasoning,
            is_free=requested is None and not tools.required,
        )
        parser = ParserSpec.of(
            markup,
            with_calls=with_calls,
            one_call=not tools.parallel,
            prompt=prompt,
            tags=tags if is_constrained else None,
        )
        grammar = answer_grammar(requested, tools, markup, end, text.token_of)
        return _Reading(grammar, parser, any(map(text.is_hidden, markers)))


def _template_kwargs(body: ChatBody) -> dict[str, object]:
    """Add the fields that templates honour. They win over arguments, as in vLLM."""
    fields = {"documents": body.documents, "reasoning_effort": body.reasoning_effort}
    present = {name: value for name, value in fields.items() if value is not None}
    return {**(body.chat_template_kwargs or {}), **present}


class ChatFormat:
    """Chunks are joined from constant parts; only the text is encoded for each token."""

    def __init__(
        self, head: AnswerHead, texts: TokenTexts, parser: ParserSpec | None = None
    ) -> None:
        """``parser`` finds tool calls and reasoning; None: the text is the content."""
        self._head = head
        self._texts = texts
        self._parser = parser
        self._opening = head.opening(_CHUNK)
        self._pieces: dict[int, AnswerPieces] = {}  # of a stream's choices
        self._plain = not (head.with_logprobs or head.with_token_ids)

    def chunks(self, output: ChoiceOutput, usage: Usage) -> bytes:
        """Return the events of one output: first the role, last the finish reason."""
        end = self._head.closing(usage)
        opening = b'%s,"choices":[{"index":%d,' % (self._opening, output.index)
        pieces = self._pieces.get(output.index)
        out = b""
        if pieces is None:
            out += self._role(opening, end)
            pieces = self._pieces[output.index] = AnswerPieces(self._parser)
        deltas = [orjson.dumps(_piece_delta(piece)) for piece in pieces.of(output)]
        if not deltas and (output.entries or (output.token_ids and self._head.with_token_ids)):
            deltas = [b'{"content":""}' if self._parser is None else b"{}"]
        beside = self._beside(output)
        for delta in deltas:
            out += b'%s"delta":%s,"logprobs":%s,"finish_reason":null%s}]%s' % (
                *(opening, delta, *beside),
                end,
            )
            beside = _NOTHING_BESIDE
        if output.finish_reason is not None:
            reason = _finish_reason(output, has_calls=pieces.n_calls > 0)
            final = {"finish_reason": reason, "stop_reason": output.stop_reason}
            out += b'%s"delta":{},"logprobs":null,%s]%s' % (opening, orjson.dumps(final)[1:], end)
        return out

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._head.usage_chunk(_CHUNK, usage)

    def body(self, choices: Sequence[ChoiceOutput], usage: Usage) -> bytes:
        shown = self._head.body("chat.completion", [self._choice(c) for c in choices], usage)
        if prompt := choices[0].prompt_logprobs_json:  # all choices have the same prompt
            shown["prompt_logprobs"] = orjson.Fragment(prompt)
        if self._head.with_token_ids:
            shown["prompt_token_ids"] = self._head.prompt_ids[0]
        return orjson.dumps(shown)

    def _role(self, opening: bytes, end: bytes) -> bytes:
        if not self._pieces:
            end = self._head.first_extras() + end
            if self._head.with_token_ids:
                end = b',"prompt_token_ids":' + orjson.dumps(self._head.prompt_ids[0]) + end
        return (
            b'%s"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]%s'
            % (opening, end)
        )

    def _beside(self, output: ChoiceOutput) -> tuple[bytes, bytes]:
        """Return the log-probabilities and the token ids."""
        if self._plain:
            return _NOTHING_BESIDE
        logprobs, ids = _NOTHING_BESIDE
        if self._head.with_logprobs:
            logprobs = orjson.dumps(chat_logprobs(output.entries, self._texts))
        if self._head.with_token_ids:
            ids = b',"token_ids":' + orjson.dumps(output.token_ids)
        return logprobs, ids

    def _choice(self, choice: ChoiceOutput) -> dict[str, object]:
        message = ParsedMessage.joined(AnswerPieces(self._parser).of(choice))
        shown: dict[str, object] = {
            "index": choice.index,
            "message": message.to_json(),
            "logprobs": None,
            "finish_reason": _finish_reason(choice, has_calls=bool(message.calls)),
            "stop_reason": choice.stop_reason,
        }
        if self._head.with_logprobs:
            shown["logprobs"] = chat_logprobs(choice.entries, self._texts)
        if self._head.with_token_ids:
            shown["token_ids"] = choice.token_ids
        return shown


def _finish_reason(output: ChoiceOutput, *, has_calls: bool) -> str | None:
    return "tool_calls" if has_calls and output.finish_reason == "stop" else output.finish_reason


def _piece_delta(piece: MessagePiece) -> dict[str, object]:
    if piece.kind == "content":
        return {"content": piece.text}
    if piece.kind == "reasoning":
        return {"reasoning_content": piece.text}
    if piece.name is None:
        call: dict[str, object] = {"index": piece.number, "function": {"arguments": piece.text}}
    else:
        function = {"name": piece.name, "arguments": piece.text}
        call = {"index": piece.number, "id": piece.id, "type": "function", "function": function}
    return {"tool_calls": [call]}
