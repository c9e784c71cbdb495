"""A plain completion: prompts in, a running generation out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from starlette.requests import Request

from loraplex_server.adapters.adapter_defaults import AdapterDefaults
from loraplex_server.adapters.resolver import ResolvedAdapter
from loraplex_server.api.errors import invalid
from loraplex_server.api.protocol.completion import CompletionBody
from loraplex_server.api.state import AppState
from loraplex_server.engine.sampling_params import SamplingParams

from .call import AnswerFormat, Prompt, TextCall
from .chat_format import AnswerHead
from .choice import CollectedChoice
from .completion_format import CompletionFormat, PromptEcho
from .sampling import limited, max_output_tokens, sampling_params, with_defaults

__all__ = ["CompletionCall", "split_prompts"]


class CompletionCall(TextCall):
    id_prefix = "cmpl-"
    prompt_param = "prompt"
    shows_prompt_in_each_choice = True

    def __init__(self, state: AppState, request: Request, body: CompletionBody) -> None:
        """Raises ApiError for everything that can be known before the adapter."""
        if body.suffix:
            raise invalid("insertion is not supported", "suffix", "unsupported_parameter")
        self._n_answered = body.n or 1
        self._best_of = _best_of(body, self._n_answered)
        self._texts, self._id_lists = split_prompts(body.prompt)
        n_prompts = len(self._texts) or len(self._id_lists)
        super().__init__(state, request, body, n_prompts, n_choices=self._best_of)
        self._completion = body
        self._echoes: list[PromptEcho | None] = []
        self._default_max_tokens: int | None = None
        for ids in self._id_lists:
            state.text.check_ids(ids, "prompt")

    def take_defaults(self, defaults: AdapterDefaults) -> None:
        super().take_defaults(defaults)
        self._completion = with_defaults(self._completion, defaults)
        self._default_max_tokens = defaults.sampling.max_tokens

    @property
    def routing_text(self) -> str:
        return "\n".join(self._texts)

    @property
    def limits_output(self) -> bool:
        return self._completion.max_tokens is not None

    @property
    def with_logprobs(self) -> bool:
        return self._completion.logprobs is not None

    @property
    def prompt_logprobs_asked(self) -> dict[str, int]:
        asked = super().prompt_logprobs_asked
        if self._completion.echo and self._completion.logprobs is not None:
            asked["logprobs"] = self._completion.logprobs
        return asked

    async def prompts(self, resolved: ResolvedAdapter) -> Sequence[Prompt]:
        encoded = await self._encode()
        sampling = await self._sampling()
        prompts = [self._prompt(ids, sampling) for ids in encoded]
        self._echoes = [await self._echo(number, ids) for number, ids in enumerate(encoded)]
        return prompts

    def format(self, head: AnswerHead) -> AnswerFormat:
        texts = self.state.text.token_texts
        return CompletionFormat(head, texts, self._echoes, n_choices=self._n_answered)

    def chosen(self, choices: Sequence[CollectedChoice]) -> Sequence[CollectedChoice]:
        """Of each prompt's ``best_of``, the ``n`` with the highest log-probability by token."""
        if self._best_of == self._n_answered:
            return choices
        found: list[CollectedChoice] = []
        for first in range(0, len(choices), self._best_of):
            ranked = sorted(choices[first : first + self._best_of], key=_mean_logprob, reverse=True)
            found += ranked[: self._n_answered]
        return [replace(choice, index=index) for index, choice in enumerate(found)]

    async def _encode(self) -> Sequence[tuple[int, ...]]:
        encoded: Sequence[tuple[int, ...]] = self._id_lists
        if self._texts:
            encoded = await self.state.text.encode_many(
                self._texts, add_special_tokens=self._completion.add_special_tokens is not False
            )
        if not all(encoded):
            raise invalid("a prompt must not be empty", "prompt")
        return encoded

    async def _sampling(self) -> SamplingParams:
        body = self._completion
        return await sampling_params(
            body,
            self.state.text,
            logprobs=body.logprobs if self._best_of == self._n_answered else body.logprobs or 0,
            prompt_logprobs=max(self.prompt_logprobs_asked.values(), default=None),
        )

    def _prompt(self, ids: tuple[int, ...], sampling: SamplingParams) -> Prompt:
        """``max_tokens: 0`` scores the prompt: one token is generated and thrown away."""
        body = self._completion
        scoring = body.max_tokens == 0
        max_tokens = max_output_tokens(
            1 if scoring else body.max_tokens,
            default=self._default_max_tokens,
            n_prompt=len(ids),
            max_model_len=self.state.engine.max_model_len,
            param="max_tokens",
            prompt_param=self.prompt_param,
        )
        return Prompt(ids, limited(sampling, max_tokens), discard_output=scoring)

    async def _echo(self, number: int, ids: tuple[int, ...]) -> PromptEcho | None:
        if not self._completion.echo:
            return None
        skip_special = self._completion.skip_special_tokens is not False
        offsets: list[int] = []
        text_of = self.state.text
        if self._completion.logprobs is None:
            text = await text_of.decode(ids, skip_special_tokens=skip_special)
        else:
            text, offsets = await text_of.offsets(ids, skip_special_tokens=skip_special)
        if self._texts and self._completion.logprobs is None:
            text = self._texts[number]
        return PromptEcho(text, ids, tuple(offsets), n_top=self._completion.logprobs or 0)


def split_prompts(
    prompt: str | list[str] | list[int] | list[list[int]],
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Texts or token ids; exactly one of the two lists is not empty."""
    if isinstance(prompt, str):
        return [prompt], []
    if isinstance(prompt[0], str):
        return [item for item in prompt if isinstance(item, str)], []
    if isinstance(prompt[0], int):
        return [], [cast("tuple[int, ...]", tuple(prompt))]
    return [], [tuple(item) for item in prompt if isinstance(item, list)]


def _best_of(body: CompletionBody, n: int) -> int:
    """Choices to generate for each prompt. Raises ApiError (400)."""
    if body.best_of is None:
        return n
    if body.best_of < n:
        raise invalid(f"best_of is {body.best_of}, fewer than n, {n}", "best_of")
    if body.stream and body.best_of > n:
        raise invalid("best_of cannot be streamed: the best is known at the end", "best_of")
    return body.best_of


def _mean_logprob(choice: CollectedChoice) -> float:
    entries = choice.entries
    return sum(entry.logprobs.logprob for entry in entries) / len(entries) if entries else -math.inf
