"""Tiny random models with every shape trap of the real ones: GQA, ff ≠ hidden, odd widths."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.files.adapter_config import AdapterConfig
from loraplex_adapter_store.files.safetensors_reader import SafetensorsFile
from loraplex_adapter_store.fold.reader import Reading, read_adapter
from loraplex_adapter_store.limits import StoreLimits

PROMPT = torch.tensor([[1, 5, 9, 33, 7, 2, 60, 5], [3, 3, 8, 21, 40, 11, 0, 63]])


def tiny_llama(*, tied: bool = False, bias: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    if bias:
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).eval()


def untouched(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy to train, since PEFT changes its model."""
    return copy.deepcopy(model)


def read_path(path: Path, model: PreTrainedModel, limits: StoreLimits | None = None) -> Reading:
    """Return the store's plan of a PEFT directory."""
    limits = limits or StoreLimits()
    config = AdapterConfig.parse((path / "adapter_config.json").read_bytes(), limits)
    with SafetensorsFile(path / "adapter_model.safetensors", limits) as tensors:
        return read_adapter(config, tensors, BaseSpec.of(model, "tiny"), limits)


def read_tensors(
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    model: PreTrainedModel,
    folder: Path,
    limits: StoreLimits | None = None,
) -> Reading:
    """Return the store's plan of a config and tensors in memory."""
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    limits = limits or StoreLimits()
    with SafetensorsFile(file, limits) as opened:
        return read_adapter(AdapterConfig(config), opened, BaseSpec.of(model, "tiny"), limits)
