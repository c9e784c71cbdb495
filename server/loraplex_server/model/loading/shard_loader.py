"""Loads one rank's part of a checkpoint as a transformers model with narrower linears.

The files are mapped, so only the pages of the part are read. Rank 0 also maps the whole model for
the readers of adapters, since DoRA's norms need whole rows.

Quantised linears are cut as codes, so the ranks have the weights of a single process, to the bit.
If a linear is quantised here and cut by inputs, a rank reads whole rows for the scales.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_kernels.formats.quantized_weight import (
    QuantizedWeight,
    WeightFormat,
    quantize_weight,
)
from loraplex_server.model.errors import ModelError
from loraplex_server.model.gguf.gguf_folder import GGUF_FILE
from loraplex_server.model.layers.tensor_parallel import ShardLayout
from loraplex_server.model.quantized.quantized_formats import (
    LinearParts,
    is_quantized,
    linear_reader,
)
from loraplex_server.model.quantized.quantized_modules import (
    generation_config,
    install_quantized,
    plain_config,
    quantization_config,
)

from .loader import run_load

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CPU = torch.device("cpu")
_TRACED_TOKENS = 2  # tokens of ``model_trace``; only rank 0 embeds others


class Checkpoint:
    """A mapped directory of safetensors. Raises ModelError for any defect."""

    def __init__(self, path: Path, size: int, quantization: WeightFormat | None = None) -> None:
        """``size``: number of ranks. ``quantization``: the format for plain linears of layers."""
        self._path, self._quantization = path, quantization
        with _named(path):
            if (path / GGUF_FILE).exists():
                raise ValueError("a GGUF file has one process; leave --tensor-parallel-size out")
            self._config = plain_config(path)
            self.layout = ShardLayout.of(self._config, size)
            self._generation = generation_config(path)
            stored = quantization_config(path)
            if stored is not None and quantization is not None:
                raise ValueError("it is quantised already; leave --quantization out")
            self._read = None if stored is None else linear_reader(stored)
            self._tensors = _map_tensors(path)
            self._coded = {} if stored is None else _coded_linears(self._tensors)

    def load(self, rank: int, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Return the rank's model on ``device``. Its own forward computes only partial sums."""
        with _named(self._path):
            return self._load(rank, dtype, device)

    def spec(self, model_id: str, dtype: torch.dtype) -> BaseSpec:
        """Return the spec of the whole base, read from the files on demand.

        A checkpoint in another dtype is copied in memory. Weights of quantised linears are computed
        on the CPU at each read.
        """
        with _named(self._path):
            model = self._skeleton(dtype)
            formats: set[WeightFormat] = set()
            for name in self._quantized_linears(model):
                whole = partial(self._quantized, name, dtype)
                formats = formats or {whole().format}  # a checkpoint has one
                model.set_submodule(name, _LinearOfFiles(model.get_submodule(name), whole))
            tensors = {name: self._tensors[name].to(dtype) for name, _ in model.named_parameters()}
            model.load_state_dict(tensors, strict=False, assign=True)
            model.tie_weights()
            return BaseSpec.of(model, model_id, quantization="+".join(formats) or None)

    def _load(self, rank: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        layout, stored = self.layout, self._tensors
        model = self._skeleton(dtype)
        quantized_names = frozenset(self._quantized_linears(model))
        tensors: dict[str, Tensor] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                bias = layout.cut_bias(name, stored.get(f"{name}.bias"), rank)
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
                rows = stored[f"{name}.weight"]
                table = rows if rank == 0 else rows[:_TRACED_TOKENS]
                tensors[f"{name}.weight"] = table
                n_rows, width = table.shape
                model.set_submodule(name, nn.Embedding(n_rows, width, device="meta"))
        missing = [n for n, _ in model.named_parameters() if n not in tensors]
        tensors |= {name: stored[name] for name in missing}
        owned = {name: t.to(device, dtype, copy=True) for name, t in tensors.items()}
        model.load_state_dict(owned, strict=True, assign=True)
        decoder = model.get_decoder()
        decoder.rotary_emb = type(decoder.rotary_emb)(self._config).to(device)
        if self._generation is not None:
            model.generation_config = self._generation
        return model.eval().requires_grad_(False)

    def _quantized_linears(self, model: PreTrainedModel) -> list[str]:
        """Return the names of quantised linears. No linear of ``model`` is replaced yet."""
        linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        if self._quantization is not None:
            return [name for name in linears if self.layout.is_cut(name)]
        for name in self._coded.keys() - set(linears):
            raise ValueError(f"it has a quantised {name}, and the model no such linear")
        return [name for name in linears if name in self._coded]

    def _quantized_part(
        self, name: str, module: nn.Linear, rank: int, dtype: torch.dtype, device: torch.device
    ) -> QuantizedWeight:
        """Return the rank's codes of a linear. ``module``: the whole linear."""
        outputs = self.layout.outputs(name, rank) or slice(None)
        inputs = self.layout.inputs(name, rank) or slice(None)
        weight = self._quantized(name, dtype, outputs, device)
        if name not in self._coded:
            outputs = slice(None)  # the weight has these alone
        elif weight.shape != (module.out_features, module.in_features):
            raise ValueError(
                f"it has a quantised {name} {list(weight.shape)}, and the model one of "
                f"{[module.out_features, module.in_features]}"
            )
        try:
            return weight.cut(outputs, inputs).to(device)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; choose another --tensor-parallel-size") from error

    def _quantized(
        self,
        name: str,
        dtype: torch.dtype,
        outputs: slice = slice(None),
        device: torch.device = _CPU,
    ) -> QuantizedWeight:
        """Return a whole linear of a quantised checkpoint on the CPU.

        Of a plain checkpoint, return the quantised ``outputs`` on ``device``: an output does not
        depend on others.
        """
        try:
            if name in self._coded:
                assert self._read is not None
                return self._read(LinearParts(self._coded[name]), dtype)
            assert self._quantization is not None
            rows = self._tensors[f"{name}.weight"][outputs].to(device, dtype)
            return quantize_weight(rows, self._quantization)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error

    def _skeleton(self, dtype: torch.dtype) -> PreTrainedModel:
        def make() -> PreTrainedModel:
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(self._config, dtype=dtype)
            return model

        return run_load(make)

    def _weight(self, model: PreTrainedModel, name: str) -> Tensor:
        """Return a linear's weight; a tied head has the embedding's."""
        tied = model.get_submodule(name) is model.get_output_embeddings() and bool(
            self._config.tie_word_embeddings
        )
        if tied:
            embedding = model.get_input_embeddings()
            name = next(n for n, module in model.named_modules() if module is embedding)
        return self._tensors[f"{name}.weight"]


class _LinearOfFiles(nn.Linear):
    """A whole linear for the spec, whose weight is computed at each read."""

    def __init__(self, whole: nn.Linear, read: Callable[[], QuantizedWeight]) -> None:
        nn.Module.__init__(self)  # without a parameter of its own
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.register_parameter("bias", whole.bias)
        self._read = read

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return the linear's weight [out, in]."""
        return self._read().dequantize()


def _coded_linears(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each quantised linear, by the last part of their names."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, leaf = key.rpartition(".")
        modules.setdefault(name, {})[leaf] = tensor
    return {name: parts for name, parts in modules.items() if is_quantized(parts)}


def _linear_like(shape: Sequence[int], bias: Tensor | None) -> nn.Linear:
    n_out, n_in = shape
    return nn.Linear(n_in, n_out, bias=bias is not None, device="meta")


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


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise type(error)(f"the base at {str(path)!r}: {error}") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"the model at {str(path)!r} cannot be loaded: {error}") from error
