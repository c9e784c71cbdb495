"""Answers one call for text: resolve → tokenise → submit → format.

A ``PromptSource`` makes the prompts of a chat or of a completion, a ``TextApi`` names the fields
of the API, and an ``AnswerFormat`` writes the answer.
"""

import math
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Generic, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.adapters.resolving.resolved_adapter import ResolvedAdapter
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.generation import GenerationBody
from loraplex_server.api.serving.disconnect import unless_client_leaves
from loraplex_server.api.serving.unsupported import OF_TEXT, refuse_unsupported
from loraplex_server.api.state import AppState
from loraplex_server.api.streaming.sse import OPENAI_SSE, SseForm, SseResponse
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.grammar import CompiledGrammar
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.errors import invalid
from loraplex_server.metrics.server_metrics import CallMetrics
from loraplex_server.model.vision.prompt_image import PromptImage

from .answer_head import AnswerHead
from .choice import ChoiceOutput, ChoiceRequest
from .engine_call import CallContext
from .generation import Generation, Usage
from .logprobs import prompt_logprobs_json
from .prediction import prediction_ids
from .sampling import defaults_of, seed_of_choice, stop_rule, with_defaults
from .structured_output import RequestedGrammar, requested_grammar

B = TypeVar("B", bound=GenerationBody)
B_contra = TypeVar("B_contra", bound=GenerationBody, contravariant=True)
_PROMPT_SHOWN = 500  # characters
_MAX_PROMPT_LOGPROBS = 1 << 17  # of one answer: some 8 MB of JSON


@dataclass(frozen=True, slots=True)
class TextApi:
    """The names that an API has for the parts of a call, and the form of its streams."""

    id_prefix: str
    prompt_param: str  # the field with the prompt, for errors
    limit_param: str | None = None  # the API's name for max_tokens, if it is another one
    sse: SseForm = OPENAI_SSE


class AnswerFormat(Protocol):
    """Writes one answer, streamed or whole."""

    def chunks(self, output: ChoiceOutput, usage: Usage) -> bytes: ...

    def usage_chunk(self, usage: Usage) -> bytes: ...

    def body(self, choices: Sequence[ChoiceOutput], usage: Usage) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and the parameters of its answer."""

    ids: tuple[int, ...]
    sampling: SamplingParams
    discard_output: bool = False
    n_turns: int = 0  # examples in the prompt
    images: tuple[PromptImage, ...] = ()


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """The prompts of a call, tokenised, and how their answers are constrained and written."""

    prompts: Sequence[Prompt]
    new_format: Callable[[AnswerHead], AnswerFormat]
    grammar: RequestedGrammar | None
    limits_output: bool  # the client says how many tokens it wants at most
    with_logprobs: bool
    shows_special_tokens: bool = False  # the reader of the answer needs them
    # field → number of most likely tokens that are shown at each token of the prompts
    prompt_logprobs: Mapping[str, int] = field(default_factory=dict)
    n_prompt_copies: int = 1  # choices that show a prompt's log-probabilities


class PromptSource(Protocol[B_contra]):
    """Makes the prompts of a call."""

    @property
    def routing_text(self) -> str:
        """The text that ``auto`` routing is based on."""

    @property
    def offers_tools(self) -> bool:
        """True if the answer may call tools; ``auto`` then prefers adapters for tools."""

    @property
    def takes_few_shot(self) -> bool:
        """True if ``prepare`` puts the adapter's examples before the prompt."""

    async def prepare(self, body: B_contra, resolved: ResolvedAdapter) -> PreparedCall:
        """``body`` has the defaults of the adapter's card. Raises ApiError."""


class TextCall(Generic[B]):
    """A call for text. The constructor checks everything that needs neither adapter nor prompt.

    Whatever happens, ``respond`` releases the adapter and cancels running requests.
    """

    def __init__(
        self,
        state: AppState,
        request: Request,
        body: B,
        api: TextApi,
        *,
        n_prompts: int = 1,
        n_choices: int | None = None,
    ) -> None:
        """``n_choices``: choices generated for each prompt; None: ``n``. Raises ApiError."""
        self.info, self.record = state.begin_call(request)
        refuse_unsupported(body.model_extra or {}, OF_TEXT)
        state.unknown_fields.warn(body.model_extra or ())
        state.lifecycle.check_admitting()
        if not state.model.writes_text:
            kind = "a text" if state.model.image_encoder is None else "an image"
            raise invalid(
                f"{state.resolver.base_name} is {kind} encoder and writes no text; ask "
                "/v1/embeddings, /classify, /score, /rerank or /pooling",
                "model",
                "base_is_encoder",
            )
        encoder = state.model.encoder
        if encoder is not None and body.model == encoder.name:
            raise invalid(
                f"{body.model} makes vectors and writes no text; use /v1/embeddings", "model"
            )
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options requires stream: true", "stream_options")
        if body.prompt_logprobs is not None and body.stream:
            raise invalid("prompt_logprobs cannot be streamed", "prompt_logprobs")
        self.state, self.request, self.api = state, request, api
        if self.info.meter is not None:
            self.info.meter.check_tokens()
        self._n = n_choices or body.n or 1
        limit = min(state.config.http.max_choices, self.info.share.max_queued or math.inf)
        if self._n * n_prompts > limit:
            raise invalid(
                f"{n_prompts} prompts × n={self._n} is more than the {limit} choices of one call",
                "n",
            )
        self.adapter_request = state.resolver.parse(**body.adapter_fields)
        self._body = body
        self.grammar: RequestedGrammar | None = requested_grammar(body)

    async def respond(self, source: PromptSource[B]) -> Response:
        """Answer whole or streamed. A client that leaves stops the work."""
        if self._body.stream:
            ping_s = self.state.config.http.ping_interval_s
            return SseResponse(self._events(source), ping_s=ping_s, form=self.api.sse)
        answer = self.answer(source)
        return ORJSONResponse(await unless_client_leaves(answer, self.request.receive))

    async def answer(self, source: PromptSource[B]) -> bytes:
        """Return the whole answer. Raises ApiError."""
        generation, format_ = await self._start(source)
        try:
            choices = await generation.collect()
            await self._share_prompt_logprobs(choices)
            return format_.body(choices, generation.usage)
        finally:
            self._close(generation)

    async def resolve(self, source: PromptSource[B]) -> ResolvedAdapter:
        """Return the adapter; the caller releases it. Raises ApiError."""
        return await self.state.resolver.resolve(
            self.adapter_request,
            source.routing_text,
            self.info.access,
            with_tools=source.offers_tools,
            takes_few_shot=source.takes_few_shot,
        )

    async def _events(self, source: PromptSource[B]) -> AsyncGenerator[bytes, None]:
        generation, format_ = await self._start(source)
        options = self._body.stream_options
        try:
            async for outputs in generation.outputs():
                usage = generation.usage
                if events := b"".join([format_.chunks(output, usage) for output in outputs]):
                    yield events
            if options is not None and options.include_usage:
                yield format_.usage_chunk(generation.usage)
        finally:
            self._close(generation)

    async def _share_prompt_logprobs(self, choices: Sequence[ChoiceOutput]) -> None:
        """Copy prompt log-probabilities from each prompt's first choice to its other choices."""
        n_top = self._body.prompt_logprobs
        for number, choice in enumerate(choices):
            first = choices[number - number % self._n]
            if choice is first and n_top is not None:
                choice.prompt_logprobs_json = await prompt_logprobs_json(
                    choice.prompt_logprobs, n_top, self.state.text.token_texts
                )
            choice.prompt_logprobs = first.prompt_logprobs
            choice.prompt_logprobs_json = first.prompt_logprobs_json

    def _close(self, generation: Generation) -> None:
        generation.close()
        self.info.add_tokens(generation.usage.n_prompt, generation.usage.n_output)

    async def _start(self, source: PromptSource[B]) -> tuple[Generation, AnswerFormat]:
        """The caller closes the generation. Raises ApiError, with the adapter released."""
        started = perf_counter()
        if self.state.config.http.show_prompts:
            self.record.prompt = source.routing_text[:_PROMPT_SHOWN]
        resolved = await self.resolve(source)
        self.info.chose(resolved.header, resolved.chosen_by)
        load_s = perf_counter() - started
        try:
            resolved.check_generates(self.adapter_request.param)
            body = with_defaults(self._body, defaults_of(resolved))
            call = await source.prepare(body, resolved)
            prompts = self._within_key_limit(call)
            self._check_prompt_logprobs(call)
            head = self._head(resolved, call)
            format_ = call.new_format(head)
            grammar = await self._compiled(call.grammar)
            predicted = await prediction_ids(body, self.state.text, self.info.tenant)
            generation = self._generation(
                self._requests(head.id, body, call, prompts, resolved, grammar, predicted),
                resolved,
                load_s,
                prompts,
            )
        except BaseException:
            resolved.release()
            raise
        await generation.start()
        return generation, format_

    async def _compiled(self, grammar: RequestedGrammar | None) -> CompiledGrammar | None:
        """Return the compiled grammar, if there is one. Raises ApiError."""
        if grammar is None:
            return None
        if self._body.allowed_token_ids is not None:
            raise invalid(
                f"allowed_token_ids cannot be combined with {grammar.param}: the grammar "
                "says which tokens are allowed",
                "allowed_token_ids",
            )
        return await self.state.grammars.compile(grammar.spec, grammar.param, self.info.tenant)

    def _within_key_limit(self, call: PreparedCall) -> Sequence[Prompt]:
        """Shorten answers without a limit of their own to the API key's limit of tokens."""
        prompts = call.prompts
        most = None if self.info.meter is None else self.info.meter.most_tokens
        if most is None or call.limits_output:
            return prompts
        n_prompt = sum(len(prompt.ids) for prompt in prompts)
        each = max(1, (most - n_prompt) // (self._n * len(prompts)))
        return [
            replace(p, sampling=replace(p.sampling, max_tokens=min(each, p.sampling.max_tokens)))
            for p in prompts
        ]

    def _check_prompt_logprobs(self, call: PreparedCall) -> None:
        """Raises ApiError (400) for more log-probabilities than one answer may hold."""
        per_token = sum(n_top + 1 for n_top in call.prompt_logprobs.values())
        n_tokens = sum(len(prompt.ids) for prompt in call.prompts)
        n_entries = n_tokens * per_token * call.n_prompt_copies
        if n_entries > _MAX_PROMPT_LOGPROBS:
            fields = [f"{name}: {n_top}" for name, n_top in call.prompt_logprobs.items()]
            raise invalid(
                f"{' and '.join(fields)} would give {n_entries:,} log-probabilities (tokens of "
                f"the prompts × {per_token} × choices that show them), an answer has at most "
                f"{_MAX_PROMPT_LOGPROBS:,}; request fewer or send less at once",
                next(iter(call.prompt_logprobs)),
            )

    def _head(self, resolved: ResolvedAdapter, call: PreparedCall) -> AnswerHead:
        options = self._body.stream_options
        include_usage = bool(options and options.include_usage)
        return AnswerHead(
            id=f"{self.api.id_prefix}{uuid.uuid4().hex}",
            created=self.state.now(),
            model=self.adapter_request.model,
            adapter=resolved.to_json(call.prompts[0].n_turns),
            routing=resolved.routing,
            with_logprobs=call.with_logprobs,
            with_token_ids=bool(self._body.return_token_ids),
            prompt_ids=[prompt.ids for prompt in call.prompts],
            include_usage=include_usage,
            usage_in_every_chunk=include_usage and bool(options and options.continuous_usage_stats),
        )

    def _requests(
        self,
        call_id: str,
        body: B,
        call: PreparedCall,
        prompts: Sequence[Prompt],
        resolved: ResolvedAdapter,
        grammar: CompiledGrammar | None,
        predicted: tuple[int, ...],
    ) -> list[ChoiceRequest]:
        """Return the engine requests: ``n`` choices for each prompt."""
        salt = f"{self.info.tenant}/{body.cache_salt or ''}".strip("/")
        skip_special = body.skip_special_tokens is not False and not call.shows_special_tokens
        stop = stop_rule(body)
        choices: list[ChoiceRequest] = []
        for prompt in prompts:
            for index in range(self._n):
                sampling = seed_of_choice(prompt.sampling, index)
                if index > 0 and not body.stream:  # the first choice has them for all
                    sampling = replace(sampling, prompt_logprobs=None)
                request = GenerationRequest(
                    request_id=f"{call_id}-{len(choices)}",
                    prompt_ids=prompt.ids,
                    sampling=sampling,
                    adapter=resolved.lease,
                    cache_salt=salt,
                    share=self.info.share,
                    grammar=None if prompt.discard_output else grammar,
                    images=prompt.images,
                    drafts=body.drafts is not False,
                    prediction_ids=predicted,
                )
                choices.append(ChoiceRequest(request, stop, skip_special, prompt.discard_output))
        return choices

    def _generation(
        self,
        choices: Sequence[ChoiceRequest],
        resolved: ResolvedAdapter,
        load_s: float,
        prompts: Sequence[Prompt],
    ) -> Generation:
        """Takes over ``resolved``, unless an error is raised."""
        state, n_prompt = self.state, sum(len(prompt.ids) for prompt in prompts)
        metrics = CallMetrics(
            state.metrics,
            self.record,
            adapter=resolved.metrics_label,
            load_s=load_s,
            n=self._n,
            max_tokens=prompts[0].sampling.max_tokens,
            n_prompt=n_prompt,
        )
        context = CallContext(
            state.engine, state.live, resolved, self.info.meter, metrics, self.api.prompt_param
        )
        return Generation(context, state.text.backend, choices, n_prompt_tokens=n_prompt)
