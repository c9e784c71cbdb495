"""Loads one rank's part of a checkpoint: a transformers model whose linears have its widths.

The files are mapped, so that of each tensor only the pages of the part are read. On rank 0 the
whole model is mapped beside it for the readers of adapters: DoRA's norms need whole rows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

from loraplex_adapter_store.base_spec import BaseSpec

from .errors import ModelError
from .loader import run_load
from .tensor_parallel import ShardLayout

__all__ = ["Checkpoint"]

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TRACED_TOKENS = 2  # that ``model_trace`` looks up; no other rank than 0 embeds


class Checkpoint:
    """A directory with safetensors of a base, mapped. Raises ModelError for all that is amiss."""

    def __init__(self, path: Path, size: int) -> None:
        """``size``: of the group of ranks."""
        with _named(path):
            self._config = AutoConfig.from_pretrained(path, local_files_only=True)
            if getattr(self._config, "quantization_config", None) is not None:
                raise ValueError(
                    "it is quantised, which is not cut over several processes yet; serve it "
                    "without --tensor-parallel-size"
                )
            self.layout = ShardLayout.of(self._config, size)
            self._tensors = _map_tensors(path)
            self._generation = _generation_config(path)

    def load(self, rank: int, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The rank's model on ``device``. Its forward alone gives parts of sums, no answers."""
        layout, found = self.layout, self._tensors
        model = self._skeleton(dtype)
        tensors: dict[str, Tensor] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                weight = layout.cut_weight(name, self._weight(model, name), rank)
                bias = layout.cut_bias(name, found.get(f"{name}.bias"), rank)
                tensors[f"{name}.weight"] = weight
                if bias is not None:
                    tensors[f"{name}.bias"] = bias
                model.set_submodule(name, _linear_like(weight, bias))
            elif isinstance(module, nn.Embedding):
                rows = found[f"{name}.weight"]
                table = rows if rank == 0 else rows[:_TRACED_TOKENS]
                tensors[f"{name}.weight"] = table
                model.set_submodule(name, _table_like(table))
        missing = [n for n, _ in model.named_parameters() if n not in tensors]
        tensors |= {name: found[name] for name in missing}
        owned = {name: t.to(device, dtype, copy=True) for name, t in tensors.items()}
        model.load_state_dict(owned, strict=True, assign=True)
        decoder = model.get_decoder()
        decoder.rotary_emb = type(decoder.rotary_emb)(self._config).to(device)
        if self._generation is not None:
            model.generation_config = self._generation
        return model.eval().requires_grad_(False)

    def spec(self, model_id: str, dtype: torch.dtype) -> BaseSpec:
        """Of the whole base in ``dtype``, read from the files when it is asked for.

        Of a checkpoint in another dtype it is a copy in memory.
        """
        model = self._skeleton(dtype)
        tensors = {name: self._tensors[name].to(dtype) for name, _ in model.named_parameters()}
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        return BaseSpec.of(model, model_id)

    def _skeleton(self, dtype: torch.dtype) -> PreTrainedModel:
        def make() -> PreTrainedModel:
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(self._config, dtype=dtype)
            return model

        return run_load(make)

    def _weight(self, model: PreTrainedModel, name: str) -> Tensor:
        """Of a linear; a tied head has that of the embedding."""
        tied = model.get_submodule(name) is model.get_output_embeddings() and bool(
            self._config.tie_word_embeddings
        )
        if tied:
            embedding = model.get_input_embeddings()
            name = next(n for n, module in model.named_modules() if module is embedding)
        return self._tensors[f"{name}.weight"]


def _linear_like(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    n_out, n_in = weight.shape
    return nn.Linear(n_in, n_out, bias=bias is not None, device="meta")


def _table_like(weight: Tensor) -> nn.Embedding:
    n_rows, width = weight.shape
    return nn.Embedding(n_rows, width, device="meta")


def _map_tensors(path: Path) -> Mapping[str, Tensor]:
    index = path / _INDEX
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif (path / _FILE).is_file():
        files = [_FILE]
    else:
        raise ValueError(f"there is no {_FILE} and no {_INDEX}, which several processes need")
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(path / Path(file).name, framework="pt") as opened:
            names = opened.keys()
            tensors.update((name, opened.get_tensor(name)) for name in names)
    return tensors


def _generation_config(path: Path) -> GenerationConfig | None:
    if not (path / "generation_config.json").is_file():
        return None
    config: GenerationConfig = GenerationConfig.from_pretrained(path, local_files_only=True)
    return config


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise type(error)(f"the base at {str(path)!r}: {error}") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"the model at {str(path)!r} cannot be loaded: {error}") from error
