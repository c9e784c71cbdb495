"""Decodes token ids to text as they arrive, without splitting a character.

Invariant: the joined results of ``push`` and ``flush`` equal the decoded text of all ids.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_CONTEXT_TOKENS = 6  # prompt tokens that give the first output token its leading space
_MAX_PENDING = 64  # tokens without a complete character, after which the text is released
_REPLACEMENT = "\ufffd"


class StreamDetokenizer:
    """Decodes the ids of one choice. Not thread-safe. ``push`` costs microseconds."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        """``context``: the prompt's ids. Only the last few are read, and they yield no text."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._pending: list[int] = []  # since the last text
        self._tail: list[int] = []  # the last ids whose text was returned
        self._stream = self._stream_after(list(context[-_CONTEXT_TOKENS:]))

    def push(self, token_id: int) -> str:
        """Return the text that this token completes: often one word, sometimes none."""
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except BaseException:  # a decoder rewrote its past; a Rust panic is no Exception
            return self._release()
        if text is None:
            return self._release() if len(self._pending) >= _MAX_PENDING else ""
        self._tail = (self._tail + self._pending)[-_CONTEXT_TOKENS:]
        self._pending.clear()
        return text

    def flush(self) -> str:
        """Return the rest, with U+FFFD for incomplete characters. Call once, at the end."""
        return self._release() if self._pending else ""

    def _release(self) -> str:
        """Decode the pending ids after the tail, and start a new stream after them."""
        before = self._decode(self._tail)
        text = self._decode(self._tail + self._pending)
        text = text[len(before) :] if text.startswith(before) else self._decode(self._pending)
        self._stream = self._stream_after((self._tail + self._pending)[-_CONTEXT_TOKENS:])
        self._pending.clear()
        return text

    def _stream_after(self, tail: list[int]) -> DecodeStream:
        # A context that ends inside a character would be returned as text again, so it is dropped.
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
