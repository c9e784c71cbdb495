"""Answers plain completions: prompts in, a running generation out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import orjson
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.adapters.resolving.resolved_adapter import ResolvedAdapter
from loraplex_server.api.protocol.completion import CompletionBody
from loraplex_server.api.serving.text_generation.answer_head import AnswerHead
from loraplex_server.api.serving.text_generation.choice import ChoiceOutput
from loraplex_server.api.serving.text_generation.generation import Usage
from loraplex_server.api.serving.text_generation.logprobs import CompletionLogprobs
from loraplex_server.api.serving.text_generation.sampling import (
    defaults_of,
    limited,
    max_output_tokens,
    sampling_params,
)
from loraplex_server.api.serving.text_generation.text_call import (
    AnswerFormat,
    PreparedCall,
    Prompt,
    TextApi,
    TextCall,
)
from loraplex_server.api.state import AppState
from loraplex_server.errors import invalid
from loraplex_server.text.token_text import TokenTexts

_API = TextApi("cmpl-", "prompt")
_KIND = "text_completion"


async def answer_completion(state: AppState, request: Request, body: CompletionBody) -> Response:
    """Answer a completion, streamed or whole. Raises ApiError."""
    if body.suffix:
        raise invalid("insertion is not supported", "suffix", "unsupported_parameter")
    best_of = _best_of(body)
    texts, id_lists = split_prompts(body.prompt)
    n_prompts = len(texts) or len(id_lists)
    call = TextCall(state, request, body, _API, n_prompts=n_prompts, n_choices=best_of)
    for ids in id_lists:
        state.text.check_ids(ids, "prompt")
    return await call.respond(CompletionSource(call, texts, id_lists, best_of))


class CompletionSource:
    """The prompts of a completion, as texts or as token ids."""

    offers_tools = False
    takes_few_shot = False

    def __init__(
        self,
        call: TextCall[CompletionBody],
        texts: Sequence[str],
        id_lists: Sequence[tuple[int, ...]],
        best_of: int,
        new_format: Callable[[AnswerHead], AnswerFormat] | None = None,
    ) -> None:
        """Exactly one of ``texts`` and ``id_lists`` is not empty.

        ``new_format`` makes what writes the answer; None: in OpenAI's form.
        """
        self._call, self._text = call, call.state.text
        self._texts, self._id_lists = texts, id_lists
        self._best_of, self._new_format = best_of, new_format

    @property
    def routing_text(self) -> str:
        return "\n".join(self._texts)

    async def prepare(self, body: CompletionBody, resolved: ResolvedAdapter) -> PreparedCall:
        encoded = await self._encode(body)
        n_choices = (self._best_of, body.n or 1)
        prompt_logprobs: dict[str, int] = {}
        if body.prompt_logprobs is not None:
            prompt_logprobs["prompt_logprobs"] = body.prompt_logprobs
        if body.echo and body.logprobs is not None:
            prompt_logprobs["logprobs"] = body.logprobs
        sampling = await sampling_params(
            body,
            self._text,
            tenant=self._call.info.tenant,
            # ``best_of`` ranks by log-probabilities.
            logprobs=body.logprobs if self._best_of == n_choices[1] else body.logprobs or 0,
            prompt_logprobs=max(prompt_logprobs.values(), default=None),
        )
        # ``max_tokens: 0`` scores the prompt: one token is generated and discarded.
        scoring = body.max_tokens == 0
        default = defaults_of(resolved).sampling.max_tokens
        prompts = []
        for ids in encoded:
            max_tokens = max_output_tokens(
                1 if scoring else body.max_tokens,
                default=default,
                n_prompt=len(ids),
                max_model_len=self._call.state.engine.max_model_len,
                param=self._call.api.limit_param or "max_tokens",
                prompt_param=self._call.api.prompt_param,
            )
            prompts.append(Prompt(ids, limited(sampling, max_tokens), discard_output=scoring))
        echoes: list[PromptEcho | None] = [None] * len(encoded)
        if body.echo:
            echoes = [await self._echo(body, number, ids) for number, ids in enumerate(encoded)]

        def new_format(head: AnswerHead) -> CompletionFormat:
            return CompletionFormat(head, self._text.token_texts, echoes, n_choices=n_choices)

        return PreparedCall(
            prompts,
            self._new_format or new_format,
            self._call.grammar,
            limits_output=body.max_tokens is not None,
            with_logprobs=body.logprobs is not None,
            prompt_logprobs=prompt_logprobs,
            n_prompt_copies=self._best_of,
        )

    async def _encode(self, body: CompletionBody) -> Sequence[tuple[int, ...]]:
        encoded: Sequence[tuple[int, ...]] = self._id_lists
        if self._texts:
            encoded = await self._text.encode_many(
                self._texts,
                add_special_tokens=body.add_special_tokens is not False,
                param=self._call.api.prompt_param,
                tenant=self._call.info.tenant,
            )
        if not all(encoded):
            raise invalid("a prompt must not be empty", "prompt")
        return encoded

    async def _echo(self, body: CompletionBody, number: int, ids: tuple[int, ...]) -> PromptEcho:
        skip_special, tenant = body.skip_special_tokens is not False, self._call.info.tenant
        if body.logprobs is not None:
            text, offsets = await self._text.offsets(
                ids, skip_special_tokens=skip_special, tenant=tenant
            )
            return PromptEcho(text, ids, tuple(offsets), n_top=body.logprobs)
        if self._texts:
            return PromptEcho(self._texts[number], ids, ())
        text = await self._text.decode(ids, skip_special_tokens=skip_special, tenant=tenant)
        return PromptEcho(text, ids, ())


def split_prompts(
    prompt: str | list[str] | list[int] | list[list[int]],
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Return texts and lists of token ids; exactly one of the two is not empty."""
    if isinstance(prompt, str):
        return [prompt], []
    if isinstance(prompt[0], str):
        return [item for item in prompt if isinstance(item, str)], []
    if isinstance(prompt[0], int):
        return [], [cast("tuple[int, ...]", tuple(prompt))]
    return [], [tuple(item) for item in prompt if isinstance(item, list)]


def _best_of(body: CompletionBody) -> int:
    """Return the choices to generate for each prompt. Raises ApiError (400)."""
    n = body.n or 1
    if body.best_of is None:
        return n
    if body.best_of < n:
        raise invalid(f"best_of is {body.best_of}, fewer than n, {n}", "best_of")
    if body.stream and body.best_of > n:
        raise invalid("best_of cannot be streamed: the best is known at the end", "best_of")
    return body.best_of


@dataclass(frozen=True, slots=True)
class PromptEcho:
    """A prompt that is repeated before its answer."""

    text: str
    ids: tuple[int, ...]
    offsets: tuple[int, ...]  # where each token's text begins
    n_top: int = 0  # most likely tokens that are shown at each token


class CompletionFormat:
    """Writes the answer of one completion."""

    def __init__(
        self,
        head: AnswerHead,
        texts: TokenTexts,
        echoes: Sequence[PromptEcho | None],
        *,
        n_choices: tuple[int, int],
    ) -> None:
        """``echoes``: None for a prompt that is not repeated. ``n_choices``: the choices that are
        generated for each prompt, and those that are answered.
        """
        self._head = head
        self._texts = texts
        self._echoes = echoes
        self._n_generated, self._n_answered = n_choices
        self._opening = head.opening(_KIND)
        self._started: set[int] = set()
        self._plain = not (head.with_logprobs or head.with_token_ids)

    def chunks(self, output: ChoiceOutput, usage: Usage) -> bytes:
        """Return the event of one output. The first output of a choice always has an event."""
        end = self._head.closing(usage)
        first = output.index not in self._started
        ends = output.finish_reason is not None
        if not (first or output.text or output.entries or output.token_ids or ends):
            return b""
        if first and not self._started:
            end = self._head.first_extras() + end
        self._started.add(output.index)
        echo = self._echoes[output.index // self._n_answered] if first else None
        if self._plain and not ends and echo is None:
            text = orjson.dumps(output.text)
            return (
                b'%s,"choices":[{"index":%d,"text":%s,"logprobs":null,"finish_reason":null}]%s'
                % (self._opening, output.index, text, end)
            )
        choice = orjson.dumps(self._choice(output, first=first))
        return b'%s,"choices":[%s]%s' % (self._opening, choice, end)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._head.usage_chunk(_KIND, usage)

    def body(self, choices: Sequence[ChoiceOutput], usage: Usage) -> bytes:
        shown = [self._choice(choice, first=True) for choice in self._best(choices)]
        return orjson.dumps(self._head.body(_KIND, shown, usage))

    def _best(self, choices: Sequence[ChoiceOutput]) -> Sequence[ChoiceOutput]:
        """Return the choices of each prompt with the highest mean log-probability."""
        if self._n_generated == self._n_answered:
            return choices
        best: list[ChoiceOutput] = []
        for first in range(0, len(choices), self._n_generated):
            of_prompt = choices[first : first + self._n_generated]
            ranked = sorted(of_prompt, key=_mean_logprob, reverse=True)
            best += ranked[: self._n_answered]
        return [replace(choice, index=index) for index, choice in enumerate(best)]

    def _choice(self, part: ChoiceOutput, *, first: bool) -> dict[str, object]:
        prompt = part.index // self._n_answered
        echo = self._echoes[prompt]
        shown: dict[str, object] = {
            "index": part.index,
            "text": echo.text + part.text if echo and first else part.text,
            "logprobs": None,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }
        if self._head.with_logprobs:
            logprobs = CompletionLogprobs(self._texts)
            if echo and first:
                logprobs.add_prompt(echo.ids, echo.offsets, part.prompt_logprobs, n_top=echo.n_top)
            logprobs.add_output(part.entries, offset=len(echo.text) if echo else 0)
            shown["logprobs"] = logprobs.to_json()
        if self._head.with_token_ids:
            shown["token_ids"] = part.token_ids
            if first:
                shown["prompt_token_ids"] = self._head.prompt_ids[prompt]
        if part.prompt_logprobs_json:
            shown["prompt_logprobs"] = orjson.Fragment(part.prompt_logprobs_json)
        return shown


def _mean_logprob(choice: ChoiceOutput) -> float:
    entries = choice.entries
    return sum(entry.logprobs.logprob for entry in entries) / len(entries) if entries else -math.inf
