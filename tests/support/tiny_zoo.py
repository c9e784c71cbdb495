"""What the generator's tests share: a tiny base on disk, its codec, an encoder of no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from loraplex_generation.frozen_base import FrozenBase
from loraplex_generation.packing import ChatCodec
from loraplex_generation.sentences import Encoded, SentenceEncoder
from tests.support.tiny_tokenizer import tiny_tokenizer

__all__ = ["HashedWords", "tiny_base", "tiny_codec", "tiny_directory", "tiny_qwen2_directory"]

_WIDTH = 48
_FIELDS: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def tiny_directory(folder: Path, *, spread: float = 0.1, **changes: Any) -> Path:
    """A random Llama of three layers, saved; `spread` is the deviation of its weights."""
    torch.manual_seed(0)
    fields = {**_FIELDS, "initializer_range": spread, **changes}
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(folder)
    return folder


def tiny_qwen2_directory(folder: Path, *, spread: float = 0.1) -> Path:
    """A random Qwen2 of the same sizes: q, k and v have biases, which are random, too."""
    torch.manual_seed(1)
    config = Qwen2Config(**_FIELDS, initializer_range=spread, eos_token_id=2)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder


def tiny_base(folder: Path) -> FrozenBase:
    return FrozenBase(folder, dtype=torch.float32)


def tiny_codec() -> ChatCodec:
    return ChatCodec(tiny_tokenizer())


class HashedWords(SentenceEncoder):
    """Every word is its own random direction: enough to tell wordings apart, no model needed."""

    def __init__(self) -> None:
        self.width = _WIDTH

    def encode(self, texts: Sequence[str]) -> Encoded:
        words = [text.lower().replace(",", " ").replace(".", " ").split() for text in texts]
        n = max(len(w) for w in words)
        tokens = torch.zeros(len(texts), n, _WIDTH)
        mask = torch.zeros(len(texts), n, dtype=torch.bool)
        for i, line in enumerate(words):
            for j, word in enumerate(line):
                tokens[i, j] = _direction(word)
                mask[i, j] = True
        mean = tokens.sum(1) / mask.sum(1, keepdim=True)
        return Encoded(tokens, mask, torch.nn.functional.normalize(mean, dim=-1))


def _direction(word: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
    return torch.randn(_WIDTH, generator=torch.Generator().manual_seed(seed))
