"""A chat completion: messages in, a running generation out."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request

from loraplex_server.adapters.adapter_defaults import AdapterDefaults
from loraplex_server.adapters.resolver import ResolvedAdapter, Turns
from loraplex_server.api.errors import invalid
from loraplex_server.api.protocol.chat import ChatBody
from loraplex_server.api.state import AppState

from .call import AnswerFormat, Prompt, TextCall
from .chat_format import AnswerHead, ChatFormat
from .chat_prompt import ChatPrompt
from .chat_protocol import ChatProtocol
from .held_regions import HeldForm
from .message_parser import ParserSpec
from .sampling import limited, max_output_tokens, sampling_params, with_defaults
from .template_form import held_protocol
from .tool_grammar import PromptEnd, answer_grammar
from .tool_use import tool_use

__all__ = ["ChatCall"]

_TAIL_TOKENS = 16  # of the prompt: enough to see whether it has opened the reasoning


class ChatCall(TextCall):
    id_prefix = "chatcmpl-"
    prompt_param = "messages"
    limit_shown: str | None = None  # another API's name for max_tokens

    def __init__(self, state: AppState, request: Request, body: ChatBody) -> None:
        """Raises ApiError for everything that can be known before the adapter."""
        super().__init__(state, request, body, n_prompts=1)
        self._chat = body
        self._tools = tool_use(body.tools, body.tool_choice, parallel=body.parallel_tool_calls)
        self._prompt = ChatPrompt(
            body.messages,
            tools=self._tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=_template_kwargs(body),
        )
        self._defaults = AdapterDefaults()
        self._parser: ParserSpec | None = None  # None: an answer is all content
        self._limit_param = (
            "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        )
        self._limit = getattr(body, self._limit_param)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")

    def take_defaults(self, defaults: AdapterDefaults) -> None:
        super().take_defaults(defaults)
        self._defaults = defaults
        self._chat = with_defaults(self._chat, defaults)

    @property
    def routing_text(self) -> str:
        return self._prompt.routing_text

    @property
    def offers_tools(self) -> bool:
        return bool(self._tools.tools)

    @property
    def limits_output(self) -> bool:
        return self._limit is not None

    @property
    def with_logprobs(self) -> bool:
        return bool(self._chat.logprobs)

    @property
    def takes_turns(self) -> bool:
        return True

    async def prompt_ids(self, protocol: ChatProtocol, turns: Turns) -> tuple[tuple[int, ...], int]:
        """And how many of ``turns`` are in it. Raises ApiError (400)."""
        context = self.state.engine.max_model_len
        most = None if self.info.meter is None else self.info.meter.most_tokens
        ids, n_turns = await self._prompt.ids_within(
            context if most is None else min(context, most),
            self.state.text,
            protocol,
            self._defaults,
            tenant=self.info.tenant,
            turns=turns,
            n_answer=self._limit,
        )
        if not ids:
            raise invalid("the messages give an empty prompt", "messages")
        return ids, n_turns

    async def prompts(self, resolved: ResolvedAdapter) -> Sequence[Prompt]:
        protocol = self.protocol(resolved)
        ids, n_turns = await self.prompt_ids(protocol, resolved.turns)
        await self._expect(protocol, ids)
        max_tokens = max_output_tokens(
            self._limit,
            default=self._defaults.sampling.max_tokens,
            n_prompt=len(ids),
            max_model_len=self.state.engine.max_model_len,
            param=self.limit_shown or self._limit_param,
            prompt_param=self.prompt_param,
        )
        logprobs = (self._chat.top_logprobs or 0) if self._chat.logprobs else None
        sampling = await sampling_params(
            self._chat,
            self.state.text,
            logprobs=logprobs,
            prompt_logprobs=self._chat.prompt_logprobs,
        )
        return [Prompt(ids, limited(sampling, max_tokens), n_turns=n_turns)]

    def format(self, head: AnswerHead) -> AnswerFormat:
        return ChatFormat(head, self.state.text.token_texts, self._parser)

    def protocol(self, resolved: ResolvedAdapter) -> ChatProtocol:
        return self._prompt.protocol(self.state.text, resolved, self._defaults)

    async def _expect(self, protocol: ChatProtocol, ids: Sequence[int]) -> None:
        """Sets what holds the answer to the tools, and what reads it."""
        with_calls = bool(self._tools.tools)
        if not with_calls and protocol.reasoning is None and protocol.response_template is None:
            return
        tail = ids if protocol.response_template is not None else ids[-_TAIL_TOKENS:]
        prompt = await self.state.text.decode(tail, skip_special_tokens=False)
        is_held = self.wanted is not None or self._tools.constrained
        if is_held:
            asked_by = None if self.wanted is None else self.wanted.param
            protocol = held_protocol(protocol, self._tools, wanted_param=asked_by, prompt=prompt)
        markers = [*(protocol.calls[:2] if with_calls else ()), *(protocol.reasoning or ())]
        self.shows_special_tokens = any(map(self.state.text.is_hidden, markers))
        end = PromptEnd.of(prompt, protocol.reasoning)
        held = HeldForm.of(
            protocol,
            with_calls=with_calls,
            in_reasoning=end.in_reasoning,
            past_reasoning=end.past_reasoning,
            is_free=self.wanted is None and not self._tools.required,
        )
        text = self.state.text
        self.wanted = answer_grammar(self.wanted, self._tools, protocol, end, text.token_of)
        self._parser = ParserSpec.of(
            protocol,
            with_calls=with_calls,
            one_call=not self._tools.parallel,
            prompt=prompt,
            held=held if is_held else None,
        )


def _template_kwargs(body: ChatBody) -> dict[str, object]:
    """With the fields that a template honours; they win over arguments, as in vLLM."""
    fields = {"documents": body.documents, "reasoning_effort": body.reasoning_effort}
    told = {name: value for name, value in fields.items() if value is not None}
    return {**(body.chat_template_kwargs or {}), **told}
