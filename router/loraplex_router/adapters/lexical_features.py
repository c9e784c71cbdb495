"""Which words a text uses, as a vector: what a sentence encoder blurs (an @, a digit, "SQL")."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["N_LEXICAL_FEATURES", "lexical_features"]

N_LEXICAL_FEATURES = 2048

_TOKEN = re.compile(r"\d|[^\W\d_]+|[^\w\s]", re.UNICODE)


def lexical_features(texts: Sequence[str]) -> Tensor:
    """float32 [n_texts, N_LEXICAL_FEATURES], unit length: words and pairs of words, hashed.

    Digits count one by one, so that any number looks like another of its length.
    """
    counts = torch.zeros(len(texts), N_LEXICAL_FEATURES)
    for row, text in enumerate(texts):
        tokens = ["0" if t.isdigit() else t for t in _TOKEN.findall(text.lower())]
        pairs = [f"{a} {b}" for a, b in itertools.pairwise(tokens)]
        for token in (*tokens, *pairs):
            counts[row, zlib.crc32(token.encode()) % N_LEXICAL_FEATURES] += 1
    return normalize(torch.log1p(counts), dim=1)
