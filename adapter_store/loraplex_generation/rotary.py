"""The rotary positions of a Llama-like base, as transformers computes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

__all__ = ["rotary_of"]


def rotary_of(directory: Path) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], int]:
    """The rotary module of the model, and up to which position it is the same in every batch.

    Longer sequences change the angles of all positions where RoPE is "dynamic" or "longrope".
    """
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    longest = int(config.max_position_embeddings)
    if config.rope_parameters["rope_type"] == "longrope":
        longest = int(config.rope_parameters["original_max_position_embeddings"])
    return LlamaRotaryEmbedding(config), longest
