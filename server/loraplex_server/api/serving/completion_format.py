"""Plain completions as JSON: the body, and the chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from loraplex_server.api.streaming.token_text import TokenTexts

from .chat_format import AnswerHead
from .choice import ChoiceDelta, CollectedChoice
from .generation import Usage
from .logprobs import CompletionLogprobs

__all__ = ["CompletionFormat", "PromptEcho"]


@dataclass(frozen=True, slots=True)
class PromptEcho:
    """A prompt that is repeated before its answer."""

    text: str
    ids: tuple[int, ...]
    offsets: tuple[int, ...]  # where each token's text begins
    n_top: int = 0  # most likely tokens to show at each, with log-probabilities


class CompletionFormat:
    def __init__(
        self,
        head: AnswerHead,
        texts: TokenTexts,
        echoes: Sequence[PromptEcho | None],
        *,
        n_choices: int,
    ) -> None:
        """``echoes``: of each prompt, None where it is not repeated; ``n_choices``: of each."""
        self._head = head
        self._texts = texts
        self._echoes = echoes
        self._n_choices = n_choices
        self._opening = head.opening("text_completion")
        self._started: set[int] = set()
        self._plain = not (head.with_logprobs or head.with_token_ids)

    def chunks(self, delta: ChoiceDelta, usage: Usage) -> bytes:
        """One event for one delta; a choice's first always comes, so that clients see it start."""
        end = self._head.closing(usage)
        first = delta.index not in self._started
        if not (first or delta.text or delta.entries or delta.token_ids or delta.finish_reason):
            return b""
        if first and not self._started:
            end = self._head.first_extras() + end
        self._started.add(delta.index)
        if (
            self._plain
            and delta.finish_reason is None
            and not (first and self._echoes[delta.index // self._n_choices])
        ):
            return (
                b'%s,"choices":[{"index":%d,"text":%s,"logprobs":null,"finish_reason":null}]%s'
                % (
                    self._opening,
                    delta.index,
                    orjson.dumps(delta.text),
                    end,
                )
            )
        choice = orjson.dumps(self._choice(delta, first=first))
        return b'%s,"choices":[%s]%s' % (self._opening, choice, end)

    def usage_chunk(self, usage: Usage) -> bytes:
        return b'%s,"choices":[],"usage":%s}\n\n' % (self._opening, orjson.dumps(usage.to_json()))

    def body(self, choices: Sequence[CollectedChoice], usage: Usage) -> bytes:
        head = self._head
        return orjson.dumps(
            {
                "id": head.id,
                "object": "text_completion",
                "created": head.created,
                "model": head.model,
                "choices": [self._choice(choice, first=True) for choice in choices],
                "usage": usage.to_json(),
                **head.extras(),
            }
        )

    def _choice(self, part: ChoiceDelta | CollectedChoice, *, first: bool) -> dict[str, object]:
        prompt = part.index // self._n_choices
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
        if isinstance(part, CollectedChoice) and part.prompt_logprobs_json:
            shown["prompt_logprobs"] = orjson.Fragment(part.prompt_logprobs_json)
        return shown
