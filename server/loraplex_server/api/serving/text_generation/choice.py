"""Turns the engine's tokens into the text and log-probabilities of one choice.

tokens → detokenizer → stop strings → text that is safe to show
                                    └ held back: may still become a stop string
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tokenizers import Tokenizer

from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.events import FinishReason, TokenEvent, TokenLogprobs
from loraplex_server.text.detokenizer import StreamDetokenizer
from loraplex_server.text.stop_strings import StopScanner

from .sampling import StopRule


@dataclass(frozen=True, slots=True)
class ChoiceRequest:
    """A choice to generate."""

    request: GenerationRequest
    stop: StopRule
    skip_special_tokens: bool = True
    discard_output: bool = False  # only the prompt's log-probabilities are wanted


class TokenEntry(NamedTuple):
    """A generated token with its log-probabilities and where its text begins."""

    logprobs: TokenLogprobs
    offset: int  # characters of output before the token


@dataclass(slots=True)
class ChoiceOutput:
    """The output that one engine event adds to a choice, or the sum of all of them."""

    index: int  # of the choice
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    entries: list[TokenEntry] = field(default_factory=list)  # empty unless logprobs are requested
    finish_reason: str | None = None  # "stop" or "length" on the last output of a choice
    stop_reason: str | int | None = None  # the stop string or stop token id that was found
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()  # on the first output, if requested
    prompt_logprobs_json: bytes = b""  # set on a whole choice, for answers that show them

    def add(self, output: ChoiceOutput) -> None:
        self.text += output.text
        self.token_ids += output.token_ids
        self.entries += output.entries
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs


class Choice:
    """Owns the text of one choice. Not thread-safe."""

    def __init__(self, index: int, spec: ChoiceRequest, tokenizer: Tokenizer) -> None:
        self.index = index
        self.spec = spec
        self.n_output = 0  # tokens generated, the end token included
        self.ended = False  # no output follows
        self._detokenizer = StreamDetokenizer(
            tokenizer,
            skip_special_tokens=spec.skip_special_tokens,
            context=spec.request.prompt_ids,
        )
        self._scanner = StopScanner(
            spec.stop.strings, include_in_output=spec.stop.include_in_output
        )
        self._n_chars = 0  # generated so far, held-back characters included
        self._n_shown = 0  # already in outputs
        # Not yet in an output:
        self._entries: list[TokenEntry] = []
        self._token_ids: list[int] = []
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()

    @property
    def request_id(self) -> str:
        return self.spec.request.request_id

    def take(self, event: TokenEvent) -> ChoiceOutput | None:
        """Return the event's output, or None while there is no token to show.

        An output with a finish reason is the last one. With a stop string it may come before the
        engine's last event.
        """
        self._prompt_logprobs = self._prompt_logprobs or event.prompt_logprobs
        if not event.token_ids and event.finish is None:
            return None
        shown, stop = self._read(event)
        if stop is not None:
            self.ended = True
            return self._output(shown, "stop", stop)
        if event.finish is not None:
            return self._finished(event, shown + self._tail())
        return self._output(shown, None, None)

    def _read(self, event: TokenEvent) -> tuple[str, str | None]:
        """Feed the tokens one by one, up to the token that completes a stop string.

        Token ids and log-probabilities of a stop string are kept, as in vLLM. The end token is
        text only where stop strings are.
        """
        shown = ""
        min_tokens = self.spec.stop.min_tokens
        token_ids = event.token_ids
        if event.stop_token is not None and self.spec.stop.include_in_output:
            token_ids = (*token_ids, event.stop_token)
        for position, token_id in enumerate(token_ids):
            self._count(event, position, token_id, offset=self._n_chars)
            text = self._detokenizer.push(token_id)
            self._n_chars += len(text)
            scanned = self._scanner.push(text, armed=self.n_output > min_tokens)
            shown += scanned.text
            if scanned.stop is not None:
                return shown, scanned.stop
        return shown, None

    def _count(self, event: TokenEvent, position: int, token_id: int, *, offset: int) -> None:
        """``position``: index in the event's log-probabilities; ``offset``: index in the text."""
        self.n_output += 1
        self._token_ids.append(token_id)
        if event.logprobs:
            self._entries.append(TokenEntry(event.logprobs[position], offset))

    def _tail(self) -> str:
        """Return the text that was held back. Its end may still complete a stop string."""
        scanned = self._scanner.push(self._detokenizer.flush())
        return scanned.text + ("" if scanned.stop else self._scanner.flush())

    def _finished(self, event: TokenEvent, shown: str) -> ChoiceOutput:
        self.ended = True
        stop_reason = None
        if event.stop_token is not None:
            if not self.spec.stop.include_in_output:
                # The token was generated and counts; only the text lacks it, as in vLLM.
                self._count(event, -1, event.stop_token, offset=self._n_shown + len(shown))
            if event.stop_token in self.spec.request.sampling.stop_token_ids:
                stop_reason = event.stop_token
        reason = "length" if event.finish is FinishReason.LENGTH else "stop"
        return self._output(shown, reason, stop_reason)

    def _output(
        self, shown: str, finish_reason: str | None, stop_reason: str | int | None
    ) -> ChoiceOutput:
        self._n_shown += len(shown)
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, ()
        token_ids, self._token_ids = self._token_ids, []
        if self.spec.discard_output:
            reason = None if finish_reason is None else "length"
            return ChoiceOutput(self.index, finish_reason=reason, prompt_logprobs=prompt_logprobs)
        entries = self._entries
        if finish_reason is None and self._n_shown < self._n_chars:
            # Text is held back for a stop string, and so are the tokens that begin in it.
            entries = [entry for entry in entries if entry.offset < self._n_shown]
        self._entries = self._entries[len(entries) :]
        return ChoiceOutput(
            self.index, shown, token_ids, entries, finish_reason, stop_reason, prompt_logprobs
        )
