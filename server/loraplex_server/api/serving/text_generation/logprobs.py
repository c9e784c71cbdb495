"""Writes log-probabilities in the shapes of chats, of completions and of vLLM's prompts."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace

import orjson

from loraplex_server.engine.requests.events import TokenLogprobs
from loraplex_server.text.token_text import TokenText, TokenTexts

from .choice import TokenEntry

_ROWS_A_TURN = 64  # rows written between two yields to the event loop
_LOWEST = -9999.0  # JSON has no −inf


def chat_logprobs(entries: Iterable[TokenEntry], texts: TokenTexts) -> dict[str, object]:
    content = []
    for entry in entries:
        chosen = entry.logprobs
        shown = _chat_token(texts.get(chosen.token_id), chosen.logprob)
        shown["top_logprobs"] = [
            _chat_token(texts.get(token_id), logprob) for token_id, logprob in chosen.top
        ]
        content.append(shown)
    return {"content": content, "refusal": None}


async def prompt_logprobs_json(
    logprobs: Sequence[TokenLogprobs | None], n_top: int, texts: TokenTexts
) -> bytes:
    """Return vLLM's list: token id → {logprob, rank, decoded_token}, for each prompt token."""
    rows: list[bytes] = []
    for number, entry in enumerate(logprobs):
        rows.append(orjson.dumps(None if entry is None else _by_token(entry, n_top, texts)))
        if number % _ROWS_A_TURN == _ROWS_A_TURN - 1:
            await asyncio.sleep(0)
    return b"[" + b",".join(rows) + b"]"


def _by_token(entry: TokenLogprobs, n_top: int, texts: TokenTexts) -> dict[str, object]:
    """List the prompt's own token first, whatever its rank."""
    ranked = [(entry.token_id, entry.logprob, entry.rank)]
    ranked += [(token, logprob, n) for n, (token, logprob) in enumerate(entry.top[:n_top], 1)]
    return {
        str(token): {
            "logprob": _finite(logprob),
            "rank": rank,
            "decoded_token": texts.get(token).text,
        }
        for token, logprob, rank in ranked
    }


class CompletionLogprobs:
    """Four parallel lists that grow with the prompt's and the output's tokens."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add_prompt(
        self,
        ids: Sequence[int],
        offsets: Sequence[int],
        logprobs: Sequence[TokenLogprobs | None],
        *,
        n_top: int,
    ) -> None:
        """The first token of a prompt has no log-probability, so its two entries are null."""
        padded = [*logprobs, *([None] * (len(ids) - len(logprobs)))]
        for token_id, offset, entry in zip(ids, offsets, padded, strict=True):
            self._add(token_id, offset, entry and replace(entry, top=entry.top[:n_top]))

    def add_output(self, entries: Iterable[TokenEntry], *, offset: int) -> None:
        """``offset``: characters of the echoed prompt before the output."""
        for entry in entries:
            self._add(entry.logprobs.token_id, offset + entry.offset, entry.logprobs)

    def to_json(self) -> dict[str, object]:
        return {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top,
            "text_offset": self._offsets,
        }

    def _add(self, token_id: int, offset: int, logprobs: TokenLogprobs | None) -> None:
        name = self._texts.get(token_id).unique
        self._tokens.append(name)
        self._offsets.append(offset)
        if logprobs is None:
            self._logprobs.append(None)
            self._top.append(None)
            return
        top = {self._texts.get(other).unique: _finite(value) for other, value in logprobs.top}
        self._logprobs.append(_finite(logprobs.logprob))
        self._top.append({**top, name: _finite(logprobs.logprob)})


def _chat_token(token: TokenText, logprob: float) -> dict[str, object]:
    return {"token": token.text, "logprob": _finite(logprob), "bytes": list(token.raw)}


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST
