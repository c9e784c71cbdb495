"""From a checked body to a running generation: the steps that chat and completions share."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.adapters.resolver import ResolvedAdapter
from loraplex_server.api.errors import invalid
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.generation import GenerationBody
from loraplex_server.api.protocol.unsupported import refuse_unsupported
from loraplex_server.api.request_info import info_of
from loraplex_server.api.state import AppState
from loraplex_server.api.streaming.sse import SseResponse
from loraplex_server.engine.client import GenerationRequest
from loraplex_server.engine.sampling_params import SamplingParams

from .chat_format import AnswerHead
from .choice import ChoiceDelta, ChoiceRequest, CollectedChoice
from .disconnect import unless_client_leaves
from .generation import Generation, Usage
from .sampling import StopRule, seed_of_choice

__all__ = ["AnswerFormat", "Call", "CallBasics", "OpenCall", "PromptPlan", "answer", "n_choices"]


class AnswerFormat(Protocol):
    """``ChatFormat`` and ``CompletionFormat``."""

    def chunks(self, delta: ChoiceDelta, usage: Usage) -> bytes: ...

    def usage_chunk(self, usage: Usage) -> bytes: ...

    def body(self, choices: Sequence[CollectedChoice], usage: Usage) -> bytes: ...


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """One prompt and how to continue it."""

    ids: tuple[int, ...]
    sampling: SamplingParams
    discard_output: bool = False


@dataclass(frozen=True, slots=True)
class OpenCall:
    generation: Generation
    format: AnswerFormat


class Call(Protocol):
    """One chat or completions call. ``open`` resolves, leases, tokenises and submits."""

    async def open(self) -> OpenCall:
        """Raises ApiError, and then holds nothing. The caller closes the generation."""


async def answer(
    call: Call, body: GenerationBody, request: Request, services: AppState
) -> Response:
    """Streams or answers at once; either way the client leaving cancels the engine requests."""
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = _events(call, request, with_usage=with_usage)
        return SseResponse(events, ping_s=services.config.http.ping_interval_s)
    return ORJSONResponse(await unless_client_leaves(_body(call, request), request.receive))


async def _events(call: Call, request: Request, *, with_usage: bool) -> AsyncGenerator[bytes, None]:
    opened = await call.open()
    generation, format_ = opened.generation, opened.format
    try:
        async for deltas in generation.deltas():
            usage = generation.usage
            if events := b"".join([format_.chunks(delta, usage) for delta in deltas]):
                yield events
        if with_usage:
            yield format_.usage_chunk(generation.usage)
    finally:
        _close(generation, request)


async def _body(call: Call, request: Request) -> bytes:
    opened = await call.open()
    try:
        choices = await opened.generation.collect()
        return opened.format.body(choices, opened.generation.usage)
    finally:
        _close(opened.generation, request)


def _close(generation: Generation, request: Request) -> None:
    generation.close()
    info = info_of(request.scope)
    info.n_prompt_tokens, info.n_output_tokens, _ = generation.usage


class CallBasics:
    """What ``open`` of both kinds of call does before and after the prompt is known."""

    def __init__(self, services: AppState, request: Request, body: GenerationBody) -> None:
        """Checks everything that needs neither adapter nor prompt. Raises ApiError."""
        refuse_unsupported(body.model_extra or {})
        services.lifecycle.check_admitting()
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options is for streams only", "stream_options")
        self.services = services
        self.info = info_of(request.scope)
        if self.info.meter is not None:
            self.info.meter.check_tokens()
        self.body = body
        self.asked = services.resolver.parse(
            model=body.model, adapter=body.adapter, adapter_id=body.adapter_id
        )

    async def choose(self, text: str) -> tuple[ResolvedAdapter, float]:
        """The adapter and the seconds it took to get."""
        started = perf_counter()
        chosen = await self.services.resolver.resolve(self.asked, text, self.info.access)
        self.info.adapter = chosen.header
        return chosen, perf_counter() - started

    def head(self, id_prefix: str, chosen: ResolvedAdapter, *, with_logprobs: bool) -> AnswerHead:
        options = self.body.stream_options
        return AnswerHead(
            id=f"{id_prefix}-{uuid.uuid4().hex}",
            created=self.services.now(),
            model=self.asked.model,
            adapter=chosen.to_json(),
            routing=chosen.routing,
            with_logprobs=with_logprobs,
            with_token_ids=bool(self.body.return_token_ids),
            include_usage=bool(options and options.include_usage),
            usage_in_every_chunk=bool(
                options and options.include_usage and options.continuous_usage_stats
            ),
        )

    def generation(
        self,
        call_id: str,
        prompts: Sequence[PromptPlan],
        stop: StopRule,
        chosen: ResolvedAdapter,
        *,
        n: int,
        load_s: float,
        prompt_param: str,
    ) -> Generation:
        """Submits ``n`` choices of each prompt. Takes over ``chosen``, also when it raises."""
        n_prompt = sum(len(prompt.ids) for prompt in prompts)
        salt = f"{self.info.tenant}/{self.body.cache_salt or ''}".strip("/")
        skip_special = self.body.skip_special_tokens is not False
        requests: list[ChoiceRequest] = []
        for prompt in prompts:
            for index in range(n):
                request = GenerationRequest(
                    request_id=f"{call_id}-{len(requests)}",
                    prompt_ids=prompt.ids,
                    sampling=seed_of_choice(prompt.sampling, index),
                    adapter=chosen.lease,
                    cache_salt=salt,
                )
                requests.append(ChoiceRequest(request, stop, skip_special, prompt.discard_output))
        generation = Generation(
            self.services.engine,
            self.services.text.backend,
            requests,
            chosen=chosen,
            live=self.services.live,
            meter=self.info.meter,
            metrics=self.services.metrics.call(
                chosen.metrics_label,
                load_s=load_s,
                n=n,
                max_tokens=prompts[0].sampling.max_tokens,
                n_prompt=n_prompt,
            ),
            prompt_param=prompt_param,
            n_prompt_tokens=n_prompt,
        )
        generation.start()
        return generation


def n_choices(body: GenerationBody, n_prompts: int, limit: int) -> int:
    """Raises ApiError (400) if one call would become more requests than allowed."""
    n = body.n or 1
    if n * n_prompts > limit:
        raise invalid(
            f"{n_prompts} prompts × n={n} is more than the {limit} choices one call may have", "n"
        )
    return n
