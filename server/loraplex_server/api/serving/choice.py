"""One choice of an answer: the engine's tokens in, text and log-probabilities out.

tokens → detokenizer → stop strings → text that is safe to show
                                    └ held back: may still become a stop string
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tokenizers import Tokenizer

from loraplex_server.api.streaming.detokenizer import StreamDetokenizer
from loraplex_server.api.streaming.stop_strings import StopScanner
from loraplex_server.engine.client import GenerationRequest
from loraplex_server.engine.events import FinishReason, TokenEvent, TokenLogprobs

from .sampling import StopRule

__all__ = ["Choice", "ChoiceDelta", "ChoiceRequest", "CollectedChoice", "TokenEntry"]


@dataclass(frozen=True, slots=True)
class ChoiceRequest:
    """One choice to generate, in the order of the answer's indices."""

    request: GenerationRequest
    stop: StopRule
    skip_special_tokens: bool = True
    discard_output: bool = False  # scoring: the prompt's log-probabilities are all that is wanted


class TokenEntry(NamedTuple):
    """A generated token with its log-probabilities and where its text begins."""

    logprobs: TokenLogprobs
    offset: int  # characters of output before it


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one event of the engine adds to one choice."""

    index: int  # of the choice
    text: str
    token_ids: tuple[int, ...]
    entries: list[TokenEntry]  # empty unless logprobs were asked for
    finish_reason: str | None  # "stop" or "length" on the last delta of a choice
    stop_reason: str | int | None  # which stop string or stop token id it was
    prompt_logprobs: tuple[TokenLogprobs | None, ...]  # on the first delta, when asked for


@dataclass(slots=True)
class CollectedChoice:
    """A choice's deltas put together, for answers that are not streamed."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    entries: list[TokenEntry] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    prompt_logprobs_json: bytes = b""  # as the answer shows them, where it does

    def add(self, delta: ChoiceDelta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.entries += delta.entries
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs


class Choice:
    """Owns the text of one choice. Not thread-safe."""

    def __init__(self, index: int, spec: ChoiceRequest, tokenizer: Tokenizer) -> None:
        self.index = index
        self.spec = spec
        self.n_output = 0  # tokens generated, the end token included
        self.ended = False  # nothing more will be shown
        self._detokenizer = StreamDetokenizer(
            tokenizer,
            skip_special_tokens=spec.skip_special_tokens,
            context=spec.request.prompt_ids,
        )
        self._scanner = StopScanner(
            spec.stop.strings, include_in_output=spec.stop.include_in_output
        )
        self._n_chars = 0  # found so far, held-back ones included
        self._n_shown = 0  # already in deltas
        # Not yet in a delta:
        self._entries: list[TokenEntry] = []
        self._token_ids: list[int] = []
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()

    @property
    def request_id(self) -> str:
        return self.spec.request.request_id

    def take(self, event: TokenEvent) -> ChoiceDelta | None:
        """None if there is nothing to show yet: a client's first delta is its first token.

        A delta with a finish reason is the last; it may come before the engine's last event, when
        a stop string was found.
        """
        self._prompt_logprobs = self._prompt_logprobs or event.prompt_logprobs
        if not event.token_ids and event.finish is None:
            return None
        shown, stop = self._read(event)
        if stop is not None:
            self.ended = True
            return self._delta(shown, "stop", stop)
        if event.finish is not None:
            return self._finished(event, shown + self._tail())
        return self._delta(shown, None, None)

    def _read(self, event: TokenEvent) -> tuple[str, str | None]:
        """Feeds the tokens one by one; stops at the token that completes a stop string.

        Ids and log-probabilities keep what the text loses to it, as in vLLM. The token that ended
        the answer is text only where stop strings are.
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
        """``position``: of its log-probability in the event; ``offset``: of its text."""
        self.n_output += 1
        self._token_ids.append(token_id)
        if event.logprobs:
            self._entries.append(TokenEntry(event.logprobs[position], offset))

    def _tail(self) -> str:
        """What was held back; a last character may still complete a stop string, then it ends."""
        scanned = self._scanner.push(self._detokenizer.flush())
        return scanned.text + ("" if scanned.stop else self._scanner.flush())

    def _finished(self, event: TokenEvent, shown: str) -> ChoiceDelta:
        self.ended = True
        stop_reason = None
        if event.stop_token is not None:
            if not self.spec.stop.include_in_output:
                # It was generated, too: only the text is without it, as in vLLM.
                self._count(event, -1, event.stop_token, offset=self._n_shown + len(shown))
            if event.stop_token in self.spec.request.sampling.stop_token_ids:
                stop_reason = event.stop_token
        reason = "length" if event.finish is FinishReason.LENGTH else "stop"
        return self._delta(shown, reason, stop_reason)

    def _delta(
        self, shown: str, finish_reason: str | None, stop_reason: str | int | None
    ) -> ChoiceDelta:
        self._n_shown += len(shown)
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, ()
        token_ids = tuple(self._token_ids)
        self._token_ids.clear()
        if self.spec.discard_output:
            reason = None if finish_reason is None else "length"
            return ChoiceDelta(self.index, "", (), [], reason, None, prompt_logprobs)
        entries = self._entries
        if finish_reason is None and self._n_shown < self._n_chars:
            # Text is held back for a stop string: so are the tokens that begin in it.
            entries = [entry for entry in entries if entry.offset < self._n_shown]
        self._entries = self._entries[len(entries) :]
        return ChoiceDelta(
            self.index, shown, token_ids, entries, finish_reason, stop_reason, prompt_logprobs
        )
