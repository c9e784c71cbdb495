"""A plain completion, from prompts to a running generation."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request

from loraplex_server.api.errors import invalid
from loraplex_server.api.protocol.generation import CompletionBody
from loraplex_server.api.state import AppState

from .call import CallBasics, OpenCall, PromptPlan, n_choices
from .completion_format import CompletionFormat, PromptEcho
from .sampling import max_output_tokens, sampling_params, stop_rule

__all__ = ["CompletionCall"]


class CompletionCall:
    def __init__(self, services: AppState, request: Request, body: CompletionBody) -> None:
        """Raises ApiError for everything that can be known before the adapter."""
        self._basics = CallBasics(services, request, body)
        self._services = services
        self._body = body
        self._stop = stop_rule(body)
        if body.suffix:
            raise invalid("insertion is not supported", "suffix", "unsupported_parameter")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise invalid("best_of other than n is not supported", "best_of")
        self._texts, self._id_lists = _prompts(body.prompt)
        n_prompts = len(self._texts) or len(self._id_lists)
        self._n = n_choices(body, n_prompts, services.config.http.max_choices)
        for ids in self._id_lists:
            services.text.check_ids(ids, "prompt")

    async def open(self) -> OpenCall:
        basics = self._basics
        chosen, load_s = await basics.choose("\n".join(self._texts))
        try:
            prompts = await self._encode()
            plans = [self._plan(ids) for ids in prompts]
            echoes = [await self._echo(number, ids) for number, ids in enumerate(prompts)]
        except BaseException:
            chosen.release()
            raise
        with_logprobs = self._body.logprobs is not None
        head = basics.head("cmpl", chosen, with_logprobs=with_logprobs)
        generation = basics.generation(
            head.id,
            plans,
            self._stop,
            chosen,
            n=self._n,
            load_s=load_s,
            prompt_param="prompt",
        )
        of_choices = [echo for echo in echoes for _ in range(self._n)]
        texts = self._services.text.token_texts
        return OpenCall(generation, CompletionFormat(head, texts, of_choices))

    async def _encode(self) -> Sequence[tuple[int, ...]]:
        prompts: Sequence[tuple[int, ...]] = self._id_lists
        if self._texts:
            prompts = await self._services.text.encode_many(
                self._texts, add_special_tokens=self._body.add_special_tokens is not False
            )
        if not all(prompts):
            raise invalid("a prompt must not be empty", "prompt")
        return prompts

    def _plan(self, ids: tuple[int, ...]) -> PromptPlan:
        """``max_tokens: 0`` scores the prompt: one token is generated and thrown away."""
        body = self._body
        scoring = body.max_tokens == 0
        max_tokens = max_output_tokens(
            1 if scoring else body.max_tokens,
            n_prompt=len(ids),
            max_model_len=self._services.engine.max_model_len,
            param="max_tokens",
            prompt_param="prompt",
        )
        sampling = sampling_params(
            body,
            self._services.text,
            max_tokens=max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        )
        return PromptPlan(ids, sampling, discard_output=scoring)

    async def _echo(self, number: int, ids: tuple[int, ...]) -> PromptEcho | None:
        if not self._body.echo:
            return None
        skip_special = self._body.skip_special_tokens is not False
        offsets: list[int] = []
        if self._body.logprobs is None:
            text = await self._services.text.decode(ids, skip_special_tokens=skip_special)
        else:
            text, offsets = await self._services.text.offsets(ids, skip_special_tokens=skip_special)
        if self._texts and self._body.logprobs is None:
            text = self._texts[number]
        return PromptEcho(text, ids, tuple(offsets))


def _prompts(
    prompt: str | list[str] | list[int] | list[list[int]],
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Texts or token ids; exactly one of the two lists is not empty. Raises ApiError (400)."""
    if isinstance(prompt, str):
        return [prompt], []
    if not prompt:
        raise invalid("prompt must not be an empty list", "prompt")
    texts = [item for item in prompt if isinstance(item, str)]
    ids = [item for item in prompt if isinstance(item, int)]
    lists = [tuple(item) for item in prompt if isinstance(item, list)]
    if texts:
        return texts, []
    return [], [tuple(ids)] if ids else lists
