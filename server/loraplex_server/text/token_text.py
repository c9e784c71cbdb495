"""The text and bytes of single tokens, for log-probabilities."""

import json
from functools import lru_cache
from typing import NamedTuple

from tokenizers import Tokenizer


class TokenText(NamedTuple):
    """The text of one token."""

    text: str  # UTF-8, with U+FFFD for incomplete characters
    raw: bytes  # lets clients rebuild characters that were split over tokens

    @property
    def unique(self) -> str:
        """Return a text that differs for different tokens, in OpenAI's style of completions."""
        if "\ufffd" in self.text:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.raw)
        return self.text


class TokenTexts:
    """A cached map from token ids to their text, for byte-level and SentencePiece vocabularies."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_level = _is_byte_level(tokenizer)
        self._bytes_of = _byte_alphabet()
        self._added = {
            i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()
        }
        self.get = lru_cache(maxsize=65536)(self._get)

    def _get(self, token_id: int) -> TokenText:
        added = self._added.get(token_id)
        if added is not None:
            return TokenText(added, added.encode())
        token = self._tokenizer.id_to_token(token_id)
        if token is None:  # padding of the logits beyond the vocabulary
            return TokenText("", b"")
        raw = self._raw(token)
        return TokenText(raw.decode("utf-8", errors="replace"), raw)

    def _raw(self, token: str) -> bytes:
        if self._byte_level:
            known = self._bytes_of
            return b"".join(bytes((known[c],)) if c in known else c.encode() for c in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes((int(token[3:5], 16),))
        return token.replace("\u2581", " ").encode()


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    if tokenizer.decoder is None:
        return False
    decoder = json.loads(tokenizer.decoder.__getstate__())
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's printable character → byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet
