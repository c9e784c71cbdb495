"""A chat completion, from messages to a running generation."""

from __future__ import annotations

from starlette.requests import Request

from loraplex_server.api.errors import invalid
from loraplex_server.api.protocol.generation import ChatBody
from loraplex_server.api.protocol.messages import plain_messages, routing_text, template_arguments
from loraplex_server.api.state import AppState

from .call import CallBasics, OpenCall, PromptPlan, n_choices
from .chat_format import ChatFormat
from .sampling import max_output_tokens, sampling_params, stop_rule

__all__ = ["ChatCall"]


class ChatCall:
    def __init__(self, services: AppState, request: Request, body: ChatBody) -> None:
        """Raises ApiError for everything that can be known before the adapter."""
        self._basics = CallBasics(services, request, body)
        self._services = services
        self._body = body
        self._stop = stop_rule(body)
        self._n = n_choices(body, 1, services.config.http.max_choices)
        self._messages = plain_messages(body.messages)
        self._template_arguments = template_arguments(body.chat_template_kwargs)
        self._limit_param = (
            "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        )
        self._limit = getattr(body, self._limit_param)
        if self._limit == 0:
            raise invalid(f"{self._limit_param} must be at least 1", self._limit_param)
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

    async def open(self) -> OpenCall:
        basics, services = self._basics, self._services
        chosen, load_s = await basics.choose(routing_text(self._messages))
        try:
            template = chosen.lease.plan.chat_template if chosen.lease else None
            ids = await services.text.encode_chat(
                self._messages,
                template=template,
                add_generation_prompt=self._generation_prompt,
                continue_final_message=bool(self._body.continue_final_message),
                template_arguments=self._template_arguments,
            )
            if not ids:
                raise invalid("the messages give an empty prompt", "messages")
            prompt = self._plan(ids)
        except BaseException:
            chosen.release()
            raise
        head = basics.head("chatcmpl", chosen, with_logprobs=bool(self._body.logprobs))
        generation = basics.generation(
            head.id,
            [prompt],
            self._stop,
            chosen,
            n=self._n,
            load_s=load_s,
            prompt_param="messages",
        )
        return OpenCall(generation, ChatFormat(head, services.text.token_texts))

    def _plan(self, ids: tuple[int, ...]) -> PromptPlan:
        max_tokens = max_output_tokens(
            self._limit,
            n_prompt=len(ids),
            max_model_len=self._services.engine.max_model_len,
            param=self._limit_param,
            prompt_param="messages",
        )
        logprobs = (self._body.top_logprobs or 0) if self._body.logprobs else None
        sampling = sampling_params(
            self._body, self._services.text, max_tokens=max_tokens, logprobs=logprobs
        )
        return PromptPlan(ids, sampling)
