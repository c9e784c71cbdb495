"""Parts of the generator's tests: a tiny base on disk, its codec and an encoder."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from loraplex_generation.sentences import Encoded, SentenceEncoder

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
    """Save a random Llama of three layers; `spread` is the deviation of its weights."""
    torch.manual_seed(0)
    fields = {**_FIELDS, "initializer_range": spread, **changes}
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(folder)
    return folder


def tiny_qwen2_directory(folder: Path, *, spread: float = 0.1) -> Path:
    """Save a random Qwen2 of the same sizes, with random biases of q, k and v."""
    torch.manual_seed(1)
    config = Qwen2Config(**_FIELDS, initializer_range=spread, eos_token_id=2)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder


class HashedWords(SentenceEncoder):
    """An encoder that adds a random direction for each word."""

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
