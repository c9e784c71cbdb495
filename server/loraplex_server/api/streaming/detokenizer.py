"""Token ids to text while they come, never splitting a character.

Invariant: what ``push`` and ``flush`` return, joined, is the one-shot decode of the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

__all__ = ["StreamDetokenizer"]

_CONTEXT_TOKENS = 6  # prompt tokens that give the first output token its leading space
_MAX_PENDING = 64  # tokens without a complete character, after which the text is let go as it is
_REPLACEMENT = "\ufffd"


class StreamDetokenizer:
    """Owns the ids of one choice. Not thread-safe. ``push`` costs microseconds."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        """``context``: the prompt's ids; only the last few are read, and they yield no text."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._pending: list[int] = []  # since the last text
        self._tail: list[int] = []  # the last ids whose text is out
        self._stream = self._stream_after(list(context[-_CONTEXT_TOKENS:]))

    def push(self, token_id: int) -> str:
        """The text that became complete with this token; often one word, sometimes empty."""
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except BaseException:  # raised where a decoder rewrites its past; a panic is no Exception
            return self._release()
        if text is None:
            return self._release() if len(self._pending) >= _MAX_PENDING else ""
        self._tail = (self._tail + self._pending)[-_CONTEXT_TOKENS:]
        self._pending.clear()
        return text

    def flush(self) -> str:
        """The rest, bytes that never became a character shown as U+FFFD. Call once, at the end."""
        return self._release() if self._pending else ""

    def _release(self) -> str:
        """Decodes what is pending after what is known, and starts a new stream behind it."""
        before = self._decode(self._tail)
        text = self._decode(self._tail + self._pending)
        text = text[len(before) :] if text.startswith(before) else self._decode(self._pending)
        self._stream = self._stream_after((self._tail + self._pending)[-_CONTEXT_TOKENS:])
        self._pending.clear()
        return text

    def _stream_after(self, tail: list[int]) -> DecodeStream:
        # A context that ends inside a character would be yielded again as text: go without it.
        prefix = self._decode(tail)
        self._tail = tail if prefix and not prefix.endswith(_REPLACEMENT) else []
        return DecodeStream(self._tail, skip_special_tokens=self._skip_special_tokens)

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        try:
            return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens))
        except Exception:
            raise
        except BaseException as error:  # a panic of the Rust tokenizer
            raise RuntimeError("the tokenizer panicked") from error
