"""Embeddings of texts by the tower of a CLIP or SigLIP in a folder, off the server."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize


@torch.inference_mode()
def tower_sentences(folder: Path, texts: Sequence[str]) -> Tensor:
    """Return float32 [n_texts, width], length 1. Texts are cut to the tower's positions."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    config = model.config
    tokens = tokenizer(
        list(texts),
        padding="max_length" if config.model_type.startswith("siglip") else True,
        truncation=True,
        max_length=config.text_config.max_position_embeddings,
        return_tensors="pt",
    )
    features = model.get_text_features(**tokens)
    pooled: Tensor = getattr(features, "pooler_output", features)
    return normalize(pooled, dim=-1)
