"""A chat or completions call: resolve → tokenise → submit → format. One object for one call."""

from __future__ import annotations

import math
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import ClassVar, Protocol

from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.adapters.adapter_defaults import AdapterDefaults
from loraplex_server.adapters.resolver import ResolvedAdapter
from loraplex_server.api.errors import invalid
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.generation import GenerationBody
from loraplex_server.api.state import AppState
from loraplex_server.api.streaming.sse import OPENAI_SSE, SseForm, SseResponse
from loraplex_server.engine.client import GenerationRequest
from loraplex_server.engine.grammar import CompiledGrammar
from loraplex_server.engine.sampling_params import SamplingParams

from .chat_format import AnswerHead
from .chat_prompt import defaults_of
from .choice import ChoiceDelta, ChoiceRequest, CollectedChoice
from .disconnect import unless_client_leaves
from .generation import Generation, Usage
from .logprobs import prompt_logprobs_json
from .sampling import StopRule, seed_of_choice, stop_rule, with_defaults
from .structured_output import Wanted, wanted_grammar
from .unsupported import OF_TEXT, refuse_unsupported

__all__ = ["AnswerFormat", "Prompt", "TextCall"]

_PROMPT_SHOWN = 500  # characters
_MAX_PROMPT_LOGPROBS = 1 << 17  # of one answer: some 8 MB of JSON


class AnswerFormat(Protocol):
    """``ChatFormat`` and ``CompletionFormat``."""

    def chunks(self, delta: ChoiceDelta, usage: Usage) -> bytes: ...

    def usage_chunk(self, usage: Usage) -> bytes: ...

    def body(self, choices: Sequence[CollectedChoice], usage: Usage) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt and how to continue it."""

    ids: tuple[int, ...]
    sampling: SamplingParams
    discard_output: bool = False
    n_turns: int = 0  # of the examples


class TextCall(ABC):
    """What ``ChatCall`` and ``CompletionCall`` share: all but the prompt and the answer's form.

    The constructor checks everything that needs neither adapter nor prompt; ``respond`` does the
    rest. Whatever happens, the adapter is released and what still runs is cancelled.
    """

    id_prefix: ClassVar[str]
    prompt_param: ClassVar[str]  # the field that holds the prompt, for errors
    shows_prompt_in_each_choice: ClassVar[bool] = False  # its log-probabilities, if asked for

    def __init__(
        self,
        state: AppState,
        request: Request,
        body: GenerationBody,
        n_prompts: int,
        *,
        n_choices: int | None = None,
    ) -> None:
        """``n_choices``: of each prompt, if others than ``n``. Raises ApiError."""
        self.info, self.record = state.begin_call(request)
        refuse_unsupported(body.model_extra or {}, OF_TEXT)
        state.unknown_fields.warn(body.model_extra or ())
        state.lifecycle.check_admitting()
        if state.encoder is not None and body.model == state.encoder.name:
            raise invalid(
                f"{body.model} gives vectors and writes no text; ask /v1/embeddings", "model"
            )
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options is for streams only", "stream_options")
        if body.prompt_logprobs is not None and body.stream:
            raise invalid("prompt_logprobs are not given in streams", "prompt_logprobs")
        self.state = state
        self.request = request
        if self.info.meter is not None:
            self.info.meter.check_tokens()
        self.stop: StopRule = stop_rule(body)
        self.n = n_choices or body.n or 1  # choices of each prompt
        limit = min(state.config.http.max_choices, self.info.share.max_queued or math.inf)
        if self.n * n_prompts > limit:
            raise invalid(
                f"{n_prompts} prompts × n={self.n} is more than the {limit} choices of one call",
                "n",
            )
        self.adapter_request = state.resolver.parse(
            model=body.model, adapter=body.adapter, adapter_id=body.adapter_id
        )
        self._body = body
        self.wanted: Wanted | None = wanted_grammar(body)  # ``prompts`` may change it
        self.shows_special_tokens = False  # so may this: what reads the answer needs to see them

    async def resolve(self) -> ResolvedAdapter:
        """The caller releases it. Raises ApiError."""
        return await self.state.resolver.resolve(
            self.adapter_request,
            self.routing_text,
            self.info.access,
            with_tools=self.offers_tools,
            takes_turns=self.takes_turns,
        )

    def take_defaults(self, defaults: AdapterDefaults) -> None:
        """What the adapter's card says where the request says nothing. Before ``prompts``."""
        self._body = with_defaults(self._body, defaults)
        self.stop = stop_rule(self._body)

    @property
    def sse_form(self) -> SseForm:
        return OPENAI_SSE

    @property
    @abstractmethod
    def routing_text(self) -> str:
        """What ``auto`` looks at."""

    @property
    def offers_tools(self) -> bool:
        """Whether the answer may call tools: ``auto`` then prefers adapters for that."""
        return False

    @property
    def takes_turns(self) -> bool:
        """Whether ``prompts`` puts the examples of what is resolved before its own turns."""
        return False

    @abstractmethod
    async def prompts(self, resolved: ResolvedAdapter) -> Sequence[Prompt]:
        """The prompts, tokenised. Raises ApiError."""

    @abstractmethod
    def format(self, head: AnswerHead) -> AnswerFormat:
        """Called after ``prompts``."""

    @property
    def limits_output(self) -> bool:
        """Whether the client said how many tokens it wants at most."""
        return True

    @property
    @abstractmethod
    def with_logprobs(self) -> bool: ...

    @property
    def prompt_logprobs_asked(self) -> dict[str, int]:
        """By field: how many most likely tokens are shown at each token of the prompts."""
        n_top = self._body.prompt_logprobs
        return {} if n_top is None else {"prompt_logprobs": n_top}

    def chosen(self, choices: Sequence[CollectedChoice]) -> Sequence[CollectedChoice]:
        """Of what was generated, what is answered."""
        return choices

    async def respond(self) -> Response:
        """Streams or answers at once; either way a client that leaves stops the work."""
        if self._body.stream:
            ping_s = self.state.config.http.ping_interval_s
            return SseResponse(self._events(), ping_s=ping_s, form=self.sse_form)
        return ORJSONResponse(await unless_client_leaves(self._answer(), self.request.receive))

    async def _events(self) -> AsyncGenerator[bytes, None]:
        generation, format_ = await self._start()
        options = self._body.stream_options
        try:
            async for deltas in generation.deltas():
                usage = generation.usage
                if events := b"".join([format_.chunks(delta, usage) for delta in deltas]):
                    yield events
            if options is not None and options.include_usage:
                yield format_.usage_chunk(generation.usage)
        finally:
            self._close(generation)

    async def _answer(self) -> bytes:
        generation, format_ = await self._start()
        try:
            choices = await generation.collect()
            await self._share_prompt_logprobs(choices)
            return format_.body(self.chosen(choices), generation.usage)
        finally:
            self._close(generation)

    async def _share_prompt_logprobs(self, choices: Sequence[CollectedChoice]) -> None:
        """Of each prompt the first choice has them."""
        n_top = self._body.prompt_logprobs
        for number, choice in enumerate(choices):
            first = choices[number - number % self.n]
            if choice is first and n_top is not None:
                choice.prompt_logprobs_json = await prompt_logprobs_json(
                    choice.prompt_logprobs, n_top, self.state.text.token_texts
                )
            choice.prompt_logprobs = first.prompt_logprobs
            choice.prompt_logprobs_json = first.prompt_logprobs_json

    def _close(self, generation: Generation) -> None:
        generation.close()
        self.info.n_prompt_tokens, self.info.n_output_tokens, _ = generation.usage

    async def _start(self) -> tuple[Generation, AnswerFormat]:
        """Raises ApiError, and then holds nothing. The caller closes the generation."""
        started = perf_counter()
        if self.state.config.http.show_prompts:
            self.record.prompt = self.routing_text[:_PROMPT_SHOWN]
        resolved = await self.resolve()
        self.info.chose(resolved.header, resolved.chosen_by)
        load_s = perf_counter() - started
        try:
            resolved.check_generates(self.adapter_request.param)
            self.take_defaults(defaults_of(resolved))
            prompts = self._within_key_limit(await self.prompts(resolved))
            self._check_prompt_logprobs(prompts)
            head = self._head(resolved, prompts)
            format_ = self.format(head)
            wanted, grammar = self.wanted, None
            if wanted is not None:
                if self._body.allowed_token_ids is not None:
                    raise invalid(
                        f"allowed_token_ids cannot be combined with {wanted.param}: the grammar "
                        "says which tokens are allowed",
                        "allowed_token_ids",
                    )
                grammar = await self.state.grammars.compile(
                    wanted.spec, wanted.param, self.info.tenant
                )
            generation = self._generation(head.id, prompts, resolved, load_s, grammar)
        except BaseException:
            resolved.release()
            raise
        await generation.start()
        return generation, format_

    def _within_key_limit(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Where the client set no limit, answers may be as long as the API key's limit allows."""
        most = None if self.info.meter is None else self.info.meter.most_tokens
        if most is None or self.limits_output:
            return prompts
        n_prompt = sum(len(prompt.ids) for prompt in prompts)
        each = max(1, (most - n_prompt) // (self.n * len(prompts)))
        return [
            replace(p, sampling=replace(p.sampling, max_tokens=min(each, p.sampling.max_tokens)))
            for p in prompts
        ]

    def _check_prompt_logprobs(self, prompts: Sequence[Prompt]) -> None:
        """Raises ApiError (400) for more than one answer may hold."""
        asked = self.prompt_logprobs_asked
        per_token = sum(n_top + 1 for n_top in asked.values())
        n_shown = self.n if self.shows_prompt_in_each_choice else 1
        n_entries = sum(len(prompt.ids) for prompt in prompts) * per_token * n_shown
        if n_entries > _MAX_PROMPT_LOGPROBS:
            fields = " and ".join(f"{field}: {n_top}" for field, n_top in asked.items())
            raise invalid(
                f"{fields} would give {n_entries:,} log-probabilities (tokens of the prompts × "
                f"{per_token} × choices that show them), an answer has at most "
                f"{_MAX_PROMPT_LOGPROBS:,}; ask for fewer or send less at once",
                next(iter(asked)),
            )

    def _head(self, resolved: ResolvedAdapter, prompts: Sequence[Prompt]) -> AnswerHead:
        options = self._body.stream_options
        include_usage = bool(options and options.include_usage)
        return AnswerHead(
            id=f"{self.id_prefix}{uuid.uuid4().hex}",
            created=self.state.now(),
            model=self.adapter_request.model,
            adapter=resolved.to_json(prompts[0].n_turns),
            routing=resolved.routing,
            with_logprobs=self.with_logprobs,
            with_token_ids=bool(self._body.return_token_ids),
            prompt_ids=[prompt.ids for prompt in prompts],
            include_usage=include_usage,
            usage_in_every_chunk=include_usage and bool(options and options.continuous_usage_stats),
        )

    def _generation(
        self,
        call_id: str,
        prompts: Sequence[Prompt],
        resolved: ResolvedAdapter,
        load_s: float,
        grammar: CompiledGrammar | None,
    ) -> Generation:
        """``n`` choices of each prompt. Takes over ``resolved``, unless it raises."""
        n_prompt = sum(len(prompt.ids) for prompt in prompts)
        salt = f"{self.info.tenant}/{self._body.cache_salt or ''}".strip("/")
        skip_special = self._body.skip_special_tokens is not False and not self.shows_special_tokens
        choices: list[ChoiceRequest] = []
        for prompt in prompts:
            for index in range(self.n):
                sampling = seed_of_choice(prompt.sampling, index)
                if index > 0 and not self._body.stream:  # the first choice tells, for all
                    sampling = replace(sampling, prompt_logprobs=None)
                request = GenerationRequest(
                    request_id=f"{call_id}-{len(choices)}",
                    prompt_ids=prompt.ids,
                    sampling=sampling,
                    adapter=resolved.lease,
                    cache_salt=salt,
                    share=self.info.share,
                    grammar=None if prompt.discard_output else grammar,
                )
                choices.append(
                    ChoiceRequest(request, self.stop, skip_special, prompt.discard_output)
                )
        return Generation(
            self.state.engine,
            self.state.text.backend,
            choices,
            chosen=resolved,
            live=self.state.live,
            meter=self.info.meter,
            metrics=self.state.metrics.call(
                resolved.metrics_label,
                load_s=load_s,
                n=self.n,
                max_tokens=prompts[0].sampling.max_tokens,
                n_prompt=n_prompt,
                record=self.record,
            ),
            prompt_param=self.prompt_param,
            n_prompt_tokens=n_prompt,
        )
