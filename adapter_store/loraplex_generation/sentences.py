"""Descriptions as vectors: MiniLM token states and sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["Encoded", "SentenceEncoder"]

_MAX_TOKENS = 128
_BATCH = 64  # texts of one forward


class Encoded(NamedTuple):
    tokens: Tensor  # float32 [n_texts, n_tokens, width]
    mask: Tensor  # bool [n_texts, n_tokens]: a real token
    sentence: Tensor  # float32 [n_texts, width]: mean over tokens, length 1

    def rows(self, index: Tensor) -> Encoded:
        return Encoded(self.tokens[index], self.mask[index], self.sentence[index])


class SentenceEncoder:
    """all-MiniLM-L6-v2, or any BERT-like directory that mean pooling suits. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer, BertModel

        self._tokenizer = AutoTokenizer.from_pretrained(directory)

        class WithoutPooler(BertModel):  # type: ignore[misc]  # untyped library
            _keys_to_ignore_on_load_unexpected = (r"^pooler\.",)  # else it prints a report

        self._model = WithoutPooler.from_pretrained(directory, add_pooling_layer=False)
        self._model.eval()
        self.width = int(self._model.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Any number of texts; the result is padded to the longest."""
        parts = [self._encode(texts[at : at + _BATCH]) for at in range(0, len(texts), _BATCH)]
        longest = max(part.tokens.shape[1] for part in parts)
        pads = [longest - part.tokens.shape[1] for part in parts]
        return Encoded(
            torch.cat(
                [F.pad(part.tokens, (0, 0, 0, n)) for part, n in zip(parts, pads, strict=True)]
            ),
            torch.cat([F.pad(part.mask, (0, n)) for part, n in zip(parts, pads, strict=True)]),
            torch.cat([part.sentence for part in parts]),
        )

    @torch.inference_mode()
    def _encode(self, texts: Sequence[str]) -> Encoded:
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        )
        states = self._model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].bool()
        weights = mask.float()[..., None]
        mean = (states * weights).sum(1) / weights.sum(1)
        return Encoded(states, mask, F.normalize(mean, dim=-1))
