"""Token states and sentence embeddings of texts, by all-MiniLM-L6-v2."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

MAX_TOKENS = 128  # of a text; the rest is cut off
_SHORT_BATCH = 16  # texts of one forward if they are sorted by length


class Encoded(NamedTuple):
    tokens: Tensor  # float32 [n_texts, n_tokens, width]
    mask: Tensor  # bool [n_texts, n_tokens]: a real token
    sentence: Tensor  # float32 [n_texts, width]: mean over tokens, length 1


class SentenceEncoder:
    """all-MiniLM-L6-v2, or another BERT-like model with mean pooling. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        """Load in float32, which keeps torch's process-wide default dtype.

        Callers must serialise loads of models within a process.
        """
        from transformers import AutoTokenizer, BertModel

        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._tokenizing = threading.Lock()  # a fast tokenizer stores its padding in itself

        class WithoutPooler(BertModel):  # type: ignore[misc]  # untyped library
            _keys_to_ignore_on_load_unexpected = (r"^pooler\.",)  # else it prints a report

        self._model = WithoutPooler.from_pretrained(
            directory, add_pooling_layer=False, dtype=torch.float32, local_files_only=True
        )
        self._model.eval().requires_grad_(False)
        self._quick = self._model
        if _has_bfloat16():
            self._quick = copy.deepcopy(self._model).to(torch.bfloat16)
        self.width = int(self._model.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode some hundred texts, at most, in float32, padded to the longest."""
        return self._encode(self._model, texts)

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """Return ``encode(texts).sentence`` up to rounding: float32 [n_texts, width], length 1.

        On CPUs with bfloat16 a copy in that dtype is used, which takes 6 ms instead of 10 and moves
        cosines by about 0.001.
        """
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        vectors = torch.empty(len(texts), self.width, dtype=torch.float32)
        for first in range(0, len(by_length), _SHORT_BATCH):
            part = by_length[first : first + _SHORT_BATCH]
            vectors[part] = self._encode(self._quick, [texts[i] for i in part]).sentence
        return vectors

    def tokenize(
        self, texts: Sequence[str], *, max_tokens: int | None = None, cut_left: bool = False
    ) -> list[list[int]]:
        """Tokenise with special tokens, which are kept if a text is cut to ``max_tokens``."""
        with self._tokenizing:
            self._tokenizer.truncation_side = "left" if cut_left else "right"
            try:
                encoded = self._tokenizer(
                    list(texts), truncation=max_tokens is not None, max_length=max_tokens
                )
            finally:
                self._tokenizer.truncation_side = "right"
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    @property
    def vocab_size(self) -> int:
        return int(self._model.config.vocab_size)

    @torch.inference_mode()
    def means(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Return the mean state of tokenised texts, float32 [n_texts, width], not normalised.

        Computed in float32 on every machine.
        """
        longest = max(map(len, ids))
        mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids])
        padded = torch.tensor([[*one, *[0] * (longest - len(one))] for one in ids])
        states = self._model(input_ids=padded, attention_mask=mask).last_hidden_state
        return _mean(states, mask)

    @torch.inference_mode()
    def _encode(self, model: Any, texts: Sequence[str]) -> Encoded:
        with self._tokenizing:
            batch = self._tokenizer(
                list(texts),
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
        states = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].bool()
        return Encoded(states, mask, F.normalize(_mean(states, mask), dim=-1))


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the states [n_texts, n_tokens, width] where the mask is set."""
    weights = mask.float()[..., None]
    mean: Tensor = (states * weights).sum(1) / weights.sum(1)
    return mean


def _has_bfloat16() -> bool:
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return probe is not None and bool(probe())
