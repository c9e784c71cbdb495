"""The sentence encoder of the process, which ``auto``, the generator and /v1/embeddings share."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from loraplex_adapter_store.part_log import worked
from loraplex_server.errors import ApiError, unavailable
from loraplex_server.model.loading.loader import Lazy

if TYPE_CHECKING:
    from loraplex_generation.sentences import SentenceEncoder

_MAX_TOKENS = 512  # of a BERT whose files state no maximum
_log = logging.getLogger(__name__)


class SharedEncoder:
    """A sentence encoder that is loaded at its first use. Thread-safe.

    After a load that failed, the next use tries again.
    """

    def __init__(self, find_directory: Callable[[], Path]) -> None:
        """``find_directory`` raises ApiError with a remedy if there is no encoder."""
        self._find_directory = find_directory
        self._encoder = Lazy(self._load)

    @property
    def dim(self) -> int:
        return self.get().width

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of the texts. Raises ApiError."""
        encoder = self.get()
        try:
            vectors = encoder.sentences(texts)
        except Exception as error:
            _log.exception("the sentence encoder failed", extra={"part": "encoder"})
            raise _unavailable("failed") from error
        worked("encoder")
        return vectors

    def get(self) -> SentenceEncoder:
        """Raises the ApiError of ``find_directory``, or 503 if the load failed."""
        return self._encoder.get()

    def _load(self) -> SentenceEncoder:
        from loraplex_generation.sentences import SentenceEncoder

        directory = self._find_directory()
        try:
            return SentenceEncoder(directory)
        except ApiError:
            raise
        except Exception as error:
            _log.exception(
                "the sentence encoder in %s cannot be loaded", directory, extra={"part": "encoder"}
            )
            raise _unavailable("cannot be loaded") from error


@dataclass(frozen=True, slots=True)
class EncoderModel:
    """The encoder as a model that clients name to get embeddings. Its calls block."""

    name: str
    max_tokens: int  # with special tokens
    shared: SharedEncoder

    @staticmethod
    def of(name: str, directory: Path, shared: SharedEncoder) -> EncoderModel:
        config = directory / "sentence_bert_config.json"
        fields = json.loads(config.read_text("utf-8")) if config.is_file() else {}
        return EncoderModel(name, int(fields.get("max_seq_length") or _MAX_TOKENS), shared)


def pieces(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Split texts for the encoder, so that texts of other tenants can go in between.

    Yields indices, shortest text first. The number of texts of a piece times the length of its
    longest text is at most ``size``, unless the piece is one text.
    """
    piece: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if piece and (len(piece) + 1) * lengths[index] > size:
            yield piece
            piece = []
        piece.append(index)
    if piece:
        yield piece


def _unavailable(what: str) -> ApiError:
    return unavailable(
        f"the sentence encoder {what}; the server's log says why, and "
        "the next request tries again; or name an adapter instead",
        "encoder_unavailable",
    )
