"""Writes hundreds of different random adapters quickly, as slices of one random buffer.

Real weights are not needed for speed, but distinct ones are: the store knows adapters by content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from .scenario import AdapterSet

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
ALL_LINEARS = (*_ATTENTION, *_MLP)
_N_EXPERTS, _TOP_K = 4, 2
_STD = 0.02


@dataclass(frozen=True, slots=True)
class ModelShape:
    n_layers: int
    linears: Mapping[str, tuple[int, int]]  # leaf → (out, in)
    hidden: int

    @staticmethod
    def of(model: Path) -> ModelShape:
        config = AutoConfig.from_pretrained(model)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
        hidden, ff = config.hidden_size, config.intermediate_size
        widths = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
        widths += [(ff, hidden), (ff, hidden), (hidden, ff)]
        linears = dict(zip(ALL_LINEARS, widths, strict=True))
        return ModelShape(config.num_hidden_layers, linears, hidden)

    def modules(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield full name and (out, in) of every linear, layer by layer."""
        for layer in range(self.n_layers):
            for leaf, widths in self.linears.items():
                block = "self_attn" if leaf in _ATTENTION else "mlp"
                yield f"model.layers.{layer}.{block}.{leaf}", widths


class _Tape:
    """A tape of random values that hands out tensors, from a start that the seed decides."""

    def __init__(self, seed: int, n_values: int = 1 << 22, std: float = _STD) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._values = (std * torch.randn(n_values, generator=generator)).bfloat16()
        self._at = 0

    def seek(self, number: int) -> None:
        self._at = number * 7919 % len(self._values)

    def take(self, *shape: int) -> Tensor:
        n = 1
        for width in shape:
            n *= width
        if self._at + n > len(self._values):
            self._at = (self._at + n) % 6007
        part = self._values[self._at : self._at + n]
        self._at += n
        return part.clone().view(shape)


def write_adapters(model: Path, adapters: AdapterSet, folder: Path, seed: int) -> Iterator[Path]:
    """Yield each directory once it is complete."""
    shape, tape = ModelShape.of(model), _Tape(seed)
    number = 0
    writers: Mapping[str, Callable[[Path, ModelShape, _Tape, int], None]] = {
        "lora": _write_lora,
        "mixlora": _write_mixlora,
        "block-lora": _write_block_lora,
    }
    for family, names in adapters.names().items():
        for index, name in enumerate(names):
            tape.seek(number)
            number += 1
            rank = adapters.ranks[index % len(adapters.ranks)]
            writers[family](folder / name, shape, tape, rank)
            yield folder / name


def write_lora(
    model: Path,
    folder: Path,
    *,
    rank: int,
    seed: int,
    targets: Sequence[str] = ALL_LINEARS,
    std: float = _STD,
) -> Path:
    """Write a plain LoRA, both factors with deviation ``std``. Returns ``folder``."""
    _write_lora(folder, ModelShape.of(model), _Tape(seed, std=std), rank, targets)
    return folder


def _write_lora(
    folder: Path,
    shape: ModelShape,
    tape: _Tape,
    rank: int,
    targets: Sequence[str] = ALL_LINEARS,
) -> None:
    tensors = {}
    for module, (n_out, n_in) in shape.modules():
        if module.rpartition(".")[2] in targets:
            tensors[f"base_model.model.{module}.lora_A.weight"] = tape.take(rank, n_in)
            tensors[f"base_model.model.{module}.lora_B.weight"] = tape.take(n_out, rank)
    extra = {"peft_type": "LORA", "target_modules": list(targets)}
    _save(folder, tensors, extra, rank)


def _write_mixlora(folder: Path, shape: ModelShape, tape: _Tape, rank: int) -> None:
    tensors = {}
    for layer in range(shape.n_layers):
        root = f"mixlora.layers.{layer}"
        tensors[f"{root}.mlp.moe_gate.weight"] = tape.take(_N_EXPERTS, shape.hidden) * 50
        for leaf, (n_out, n_in) in shape.linears.items():
            if leaf in _ATTENTION:
                places = [f"{root}.self_attn.{leaf}"]
            else:
                places = [f"{root}.mlp.{leaf}.experts.{expert}" for expert in range(_N_EXPERTS)]
            for place in places:
                tensors[f"{place}.lora_A.weight"] = tape.take(rank, n_in)
                tensors[f"{place}.lora_B.weight"] = tape.take(n_out, rank)
    extra = {
        "peft_type": "MIXLORA",
        "routing_strategy": "mixlora",
        "num_experts": _N_EXPERTS,
        "top_k": _TOP_K,
        "act_fn": "silu",
    }
    _save(folder, tensors, extra, rank)


def _write_block_lora(folder: Path, shape: ModelShape, tape: _Tape, rank: int) -> None:
    n_blocks = 2
    rank += rank % n_blocks
    tensors = {}
    for module, (n_out, n_in) in shape.modules():
        at = f"base_model.model.{module}.block_lora"
        tensors[f"{at}_A.weight"] = tape.take(rank // n_blocks, n_in)
        tensors[f"{at}_B.weight"] = tape.take(n_blocks, n_out, rank // n_blocks)
    extra = {"peft_type": "BLOCK_LORA", "block_axis": "rank", "n_blocks": n_blocks}
    _save(folder, tensors, extra, rank)


def _save(folder: Path, tensors: dict[str, Tensor], extra: Mapping[str, object], rank: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(ALL_LINEARS),
        **extra,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
