"""The sentence encoder as a model that clients may ask for vectors by its own name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .sentence_encoder import SharedEncoder

__all__ = ["EncoderModel"]

_MAX_TOKENS = 512  # of a BERT that does not say


@dataclass(frozen=True, slots=True)
class EncoderModel:
    """Loaded at its first use, as ``shared`` is. Blocking calls: use a thread."""

    name: str
    max_tokens: int  # special ones included
    shared: SharedEncoder

    @staticmethod
    def of(name: str, directory: Path, shared: SharedEncoder) -> EncoderModel:
        config = directory / "sentence_bert_config.json"
        stated = json.loads(config.read_text("utf-8")) if config.is_file() else {}
        return EncoderModel(name, int(stated.get("max_seq_length") or _MAX_TOKENS), shared)
