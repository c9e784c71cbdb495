"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190): keys and values of virtual tokens, in every
layer, before those of the text. No MLP makes them, as in P-tuning v2 (Liu et al. 2021, arXiv
2110.07602).

They start as what the base's attention keeps of the first tokens of the data (section 7.4 of the
first paper: activations of real words; PEFT starts from random numbers).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from loraplex_training.config import AdapterShape, PrefixShape
from loraplex_training.engine.adapter import LearningAdapter
from loraplex_training.errors import TrainingError

from .decoder_start import DecoderStart

_FILE_NAME = "prompt_embeddings"


class Prefix(LearningAdapter):
    def __init__(self, start: DecoderStart, shape: AdapterShape) -> None:
        """Raises TrainingError without data, and for a base whose layers differ in their sizes."""
        if not start.data:
            raise TrainingError("a prefix starts from the data and needs some")
        n = (shape.prefix or PrefixShape()).n_tokens
        tokens = torch.cat([datum.tokens for datum in start.data])
        tokens = tokens.repeat(-(-n // len(tokens)))[:n]
        super().__init__(start.shape, {})
        self._prefix = start.model.keys_and_values(tokens).clone().requires_grad_()
        self.parameters = {_FILE_NAME: self._prefix}

    @property
    def prefix(self) -> Tensor | None:
        return self._prefix

    def named_tensors(self) -> Mapping[str, Tensor]:
        return {_FILE_NAME: self._prefix.flatten(1)}

    def peft_config(self, base_name: str) -> dict[str, object]:
        n, n_layers, _, n_heads, head_dim = self._prefix.shape
        return {
            "peft_type": "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "num_virtual_tokens": n,
            "num_transformer_submodules": 1,
            "num_layers": n_layers,
            "num_attention_heads": n_heads,
            "token_dim": n_heads * head_dim,
            "encoder_hidden_size": n_heads * head_dim,
            "prefix_projection": False,
        }
