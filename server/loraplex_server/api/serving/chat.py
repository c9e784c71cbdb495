"""A chat completion: messages in, a running generation out."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request

from loraplex_server.adapters.resolver import ResolvedAdapter
from loraplex_server.api.errors import invalid
from loraplex_server.api.protocol.chat import ChatBody
from loraplex_server.api.state import AppState

from .call import AnswerFormat, Prompt, TextCall
from .chat_format import AnswerHead, ChatFormat
from .messages import plain_messages, routing_text, template_arguments
from .sampling import max_output_tokens, sampling_params

__all__ = ["ChatCall"]


class ChatCall(TextCall):
    id_prefix = "chatcmpl"
    prompt_param = "messages"

    def __init__(self, state: AppState, request: Request, body: ChatBody) -> None:
        """Raises ApiError for everything that can be known before the adapter."""
        super().__init__(state, request, body, n_prompts=1)
        self._chat = body
        self._messages = plain_messages(body.messages)
        self._template_arguments = template_arguments(body.chat_template_kwargs)
        self._limit_param = (
            "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        )
        self._limit = getattr(body, self._limit_param)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        self._generation_prompt = body.add_generation_prompt is not False
        if body.continue_final_message:
            if body.add_generation_prompt:
                raise invalid(
                    "continue_final_message and add_generation_prompt exclude each other",
                    "continue_final_message",
                )
            self._generation_prompt = False

    @property
    def routing_text(self) -> str:
        return routing_text(self._messages)

    @property
    def with_logprobs(self) -> bool:
        return bool(self._chat.logprobs)

    async def prompts(self, resolved: ResolvedAdapter) -> Sequence[Prompt]:
        ids = await self.state.text.encode_chat(
            self._messages,
            template=resolved.lease.plan.chat_template if resolved.lease else None,
            add_generation_prompt=self._generation_prompt,
            continue_final_message=bool(self._chat.continue_final_message),
            template_arguments=self._template_arguments,
        )
        if not ids:
            raise invalid("the messages give an empty prompt", "messages")
        max_tokens = max_output_tokens(
            self._limit,
            n_prompt=len(ids),
            max_model_len=self.state.engine.max_model_len,
            param=self._limit_param,
            prompt_param=self.prompt_param,
        )
        logprobs = (self._chat.top_logprobs or 0) if self._chat.logprobs else None
        sampling = sampling_params(
            self._chat, self.state.text, max_tokens=max_tokens, logprobs=logprobs
        )
        return [Prompt(ids, sampling)]

    def format(self, head: AnswerHead) -> AnswerFormat:
        return ChatFormat(head, self.state.text.token_texts)
