"""all-MiniLM-L6-v2: mean of the token states, unit length, through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

__all__ = ["MAX_TOKENS", "MiniLmEncoder"]

MAX_TOKENS = 128  # of a text; what comes later is cut off
_BATCH = 16


class MiniLmEncoder:
    """An ``Encoder`` of ``loraplex_router.adapters``. One thread at a time.

    bfloat16 is twice to thrice as fast on CPUs that have it and moves no decision (a cosine by
    about 0.001); float32 runs anywhere.
    """

    def __init__(self, directory: Path, *, dtype: torch.dtype | None = None) -> None:
        chosen = dtype or (torch.bfloat16 if _has_bfloat16() else torch.float32)
        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = AutoModel.from_pretrained(directory, dtype=chosen, local_files_only=True)
        self._model = model.eval().requires_grad_(False)

    @property
    def dim(self) -> int:
        return int(self._model.config.hidden_size)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        vectors = torch.empty(len(texts), self.dim)
        for first in range(0, len(by_length), _BATCH):
            part = by_length[first : first + _BATCH]
            vectors[part] = self._encode([texts[i] for i in part])
        return vectors

    def _encode(self, texts: list[str]) -> Tensor:
        inputs = self._tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        states = self._model(**inputs).last_hidden_state.float()  # [n, n_tokens, dim]
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def _has_bfloat16() -> bool:
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return probe is not None and bool(probe())
