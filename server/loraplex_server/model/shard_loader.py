"""Loads one rank's part of a checkpoint: a transformers model whose linears have its widths.

The files are mapped, so that of each tensor only the pages of the part are read. On rank 0 the
whole model is mapped beside it for the readers of adapters: DoRA's norms need whole rows.

Quantised linears are cut as codes: ranks have the weights of one process, to the bit. So where they
are quantised here, by inputs, a rank reads whole rows: its scales are those of all inputs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_kernels.quantized_weight import QuantizedWeight, WeightFormat, quantize_weight

from .errors import ModelError
from .loader import run_load
from .quantized_checkpoint import plain_config, quantization_config
from .quantized_formats import LinearParts, is_quantized, linear_reader
from .quantized_modules import install_quantized
from .tensor_parallel import ShardLayout

__all__ = ["Checkpoint"]

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TRACED_TOKENS = 2  # that ``model_trace`` looks up; no other rank than 0 embeds


class Checkpoint:
    """A directory with safetensors of a base, mapped. Raises ModelError for all that is amiss."""

    def __init__(self, path: Path, size: int, quantization: WeightFormat | None = None) -> None:
        """``size``: of the group of ranks. ``quantization``: of plain linears of the layers."""
        self._path, self._quantization = path, quantization
        with _named(path):
            self._config = plain_config(path)
            self.layout = ShardLayout.of(self._config, size)
            self._generation = _generation_config(path)
            stored = quantization_config(path)
            if stored is not None and quantization is not None:
                raise ValueError("it is quantised already; leave --quantization out")
            self._read = None if stored is None else linear_reader(stored)
            self._tensors = _map_tensors(path)
            self._coded = {} if stored is None else _coded_linears(self._tensors)

    def load(self, rank: int, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The rank's model on ``device``. Its forward alone gives parts of sums, no answers."""
        with _named(self._path):
            return self._load(rank, dtype, device)

    def spec(self, model_id: str, dtype: torch.dtype) -> BaseSpec:
        """Of the whole base in ``dtype``, read from the files when it is asked for.

        Of a checkpoint in another dtype it is a copy in memory. The weights of quantised linears
        are computed on the CPU at each look.
        """
        with _named(self._path):
            model = self._skeleton(dtype)
            formats: set[WeightFormat] = set()
            for name in self._quantized_linears(model):
                whole = partial(self._whole, name, dtype)
                formats = formats or {whole().format}  # a checkpoint has one
                model.set_submodule(name, _LinearOfFiles(model.get_submodule(name), whole))
            tensors = {name: self._tensors[name].to(dtype) for name, _ in model.named_parameters()}
            model.load_state_dict(tensors, strict=False, assign=True)
            model.tie_weights()
            return BaseSpec.of(model, model_id, quantization="+".join(formats) or None)

    def _load(self, rank: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        layout, found = self.layout, self._tensors
        model = self._skeleton(dtype)
        quantized_names = frozenset(self._quantized_linears(model))
        tensors: dict[str, Tensor] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                bias = layout.cut_bias(name, found.get(f"{name}.bias"), rank)
                if bias is not None:
                    tensors[f"{name}.bias"] = bias
                if name in quantized_names:
                    part = self._quantized_part(name, module, rank, dtype, device)
                    model.set_submodule(name, _linear_like(part.shape, bias))
                    install_quantized(model, {name: part})
                    continue
                weight = layout.cut_weight(name, self._weight(model, name), rank)
                tensors[f"{name}.weight"] = weight
                model.set_submodule(name, _linear_like(weight.shape, bias))
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

    def _quantized_linears(self, model: PreTrainedModel) -> list[str]:
        """Names, of a model none of whose linears is replaced yet."""
        linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        if self._quantization is not None:
            return [name for name in linears if self.layout.is_cut(name)]
        for name in self._coded.keys() - set(linears):
            raise ValueError(f"it has a quantised {name}, and the model no such linear")
        return [name for name in linears if name in self._coded]

    def _quantized_part(
        self, name: str, module: nn.Linear, rank: int, dtype: torch.dtype, device: torch.device
    ) -> QuantizedWeight:
        """``module``: the whole linear."""
        outputs = self.layout.outputs(name, rank) or slice(None)
        inputs = self.layout.inputs(name, rank) or slice(None)
        if name in self._coded:
            found = self._decoded(name, dtype)
            if found.shape != (module.out_features, module.in_features):
                raise ValueError(
                    f"it has a quantised {name} {list(found.shape)}, and the model one of "
                    f"{[module.out_features, module.in_features]}"
                )
        else:  # what an output becomes does not depend on others
            found, outputs = self._quantize(name, outputs, dtype, device), slice(None)
        try:
            return found.cut(outputs, inputs).to(device)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; choose another --tensor-parallel-size") from error

    def _whole(self, name: str, dtype: torch.dtype) -> QuantizedWeight:
        """Of a quantised linear, on the CPU."""
        if name in self._coded:
            return self._decoded(name, dtype)
        return self._quantize(name, slice(None), dtype, torch.device("cpu"))

    def _decoded(self, name: str, dtype: torch.dtype) -> QuantizedWeight:
        assert self._read is not None
        try:
            return self._read(LinearParts(self._coded[name]), dtype)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error

    def _quantize(
        self, name: str, outputs: slice, dtype: torch.dtype, device: torch.device
    ) -> QuantizedWeight:
        assert self._quantization is not None
        rows = self._tensors[f"{name}.weight"][outputs].to(device, dtype)
        try:
            return quantize_weight(rows, self._quantization)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

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


class _LinearOfFiles(nn.Linear):
    """A whole linear for the spec, whose weight is computed for whoever asks."""

    def __init__(self, whole: nn.Linear, read: Callable[[], QuantizedWeight]) -> None:
        nn.Module.__init__(self)  # without a parameter of its own
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.register_parameter("bias", whole.bias)
        self._read = read

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in]."""
        return self._read().dequantize()


def _coded_linears(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each quantised linear, by the last part of their names."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, leaf = key.rpartition(".")
        modules.setdefault(name, {})[leaf] = tensor
    return {name: parts for name, parts in modules.items() if is_quantized(parts)}


def _linear_like(shape: Sequence[int], bias: Tensor | None) -> nn.Linear:
    n_out, n_in = shape
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
