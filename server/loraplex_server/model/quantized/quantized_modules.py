"""Quantised linears as modules of a transformers model, until they are packed.

Reads checkpoints with quantised linears without rounding them again.

The weight is computed from codes at each read, so every reader of the model sees the served
weights: transformers' own forward in the self-check, the trace, and the spec with its fingerprint
and norms. Only one weight at a time is dequantised.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from loraplex_kernels.cpu.gguf_weight import GgufWeight
from loraplex_kernels.formats.quantized_weight import (
    QuantizedWeight,
    WeightFormat,
    quantize_weight,
)
from loraplex_server.model.errors import ModelError

from .quantized_formats import LinearParts, is_quantized, linear_reader

_ROUTERS = ("gate", "router", "shared_expert_gate")  # of experts: small, so not quantised
_MIB = 1 << 20
_log = logging.getLogger(__name__)


CodedWeight = QuantizedWeight | GgufWeight


class _QuantizedLinear(nn.Linear):
    """A linear with the forward of ``nn.Linear``."""

    def __init__(self, quantized: CodedWeight, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)  # without a parameter of its own
        self.quantized = quantized
        self.out_features, self.in_features = quantized.shape
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight [out, in]."""
        return self.quantized.dequantize()


class _QuantizedConv1D(Conv1D):  # type: ignore[misc]
    """A linear of GPT-2, whose weight is [in, out]."""

    def __init__(self, quantized: CodedWeight, bias: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.quantized = quantized
        self.nf, self.nx = quantized.shape
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        return self.quantized.dequantize().t()


class BlockEmbedding(nn.Embedding):
    """An embedding in the blocks of a GGUF file."""

    def __init__(self, quantized: GgufWeight, embed_scale: Tensor | None) -> None:
        """``embed_scale``: multiplies the rows, as in Gemma."""
        nn.Module.__init__(self)  # without a parameter of its own
        self.quantized = quantized
        self.num_embeddings, self.embedding_dim = quantized.shape
        self.embed_scale = embed_scale

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised table [n_rows, width]."""
        return self.quantized.dequantize()

    def forward(self, ids: Tensor) -> Tensor:
        """Map ``ids`` [...] to [..., width]."""
        rows = self.quantized.take(ids.reshape(-1)).view(*ids.shape, -1)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.dtype)


QuantizedModule = _QuantizedLinear | _QuantizedConv1D


def quantize_linears(model: PreTrainedModel, format: WeightFormat, device: torch.device) -> None:
    """Quantises the linears of the layers, one by one, on ``device``.

    The output head, embeddings, norms, routers of experts and stacked experts keep their dtype.
    Raises ValueError for weights that are not finite.
    """
    before = after = 0
    for name, module in list(_linears(model)):
        if name.rpartition(".")[2] in _ROUTERS:
            continue
        weight = module.weight.detach()
        before += weight.nbytes
        rows = weight if isinstance(module, nn.Linear) else weight.t()
        try:
            quantized = quantize_weight(rows.to(device), format)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        after += quantized.n_bytes
        _replace(model, name, quantized)
    stacked = sum(p.nbytes for p in model.parameters() if p.dim() == 3)
    _log.info(
        "weights of linears: %d MiB in %s, they were %d MiB%s",
        after // _MIB,
        format,
        before // _MIB,
        f"; {stacked // _MIB} MiB of stacked experts stay as they are" if stacked else "",
    )


def install_quantized(model: PreTrainedModel, weights: Mapping[str, CodedWeight]) -> None:
    """Replaces the named linears by quantised ones."""
    for name, quantized in weights.items():
        _replace(model, name, quantized)


def quantization_of(model: nn.Module) -> str | None:
    """Return the formats of the quantised linears, such as "int8"; None without any."""
    formats = {m.quantized.format for m in model.modules() if isinstance(m, QuantizedModule)}
    return "+".join(sorted(formats)) or None


def coded_weight(module: nn.Module) -> CodedWeight | None:
    """Return the weight of a quantised module or embedding; None if it is plain."""
    if isinstance(module, BlockEmbedding):
        return module.quantized
    return module.quantized if isinstance(module, QuantizedModule) else None


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if module is not head and (plain or isinstance(module, Conv1D)):
            yield name, module


def _replace(model: PreTrainedModel, name: str, quantized: CodedWeight) -> None:
    module = model.get_submodule(name)
    kind = _QuantizedConv1D if isinstance(module, Conv1D) else _QuantizedLinear
    linear = kind(quantized, module.bias)
    linear.train(module.training)
    model.set_submodule(name, linear)


def quantization_config(path: Path) -> dict[str, Any] | None:
    """Return the quantisation part of ``config.json``; None if the weights are plain."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # transformers reports the problem
    part = config.get("quantization_config") or config.get("compression_config")
    return part if isinstance(part, dict) else None


def plain_config(path: Path) -> PretrainedConfig:
    """Return the model's config without its quantisation part, which transformers must not see."""
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    return config


def generation_config(path: Path) -> GenerationConfig | None:
    if not (path / "generation_config.json").is_file():
        return None
    config: GenerationConfig = GenerationConfig.from_pretrained(path, local_files_only=True)
    return config


def load_quantized(
    path: Path, config: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Return the model with its codes on ``device`` and the rest on the CPU, in ``dtype``.

    ``config``: see ``quantization_config``. Raises ModelError for an unsupported format, and for
    missing or unexpected tensors.
    """
    read = linear_reader(config)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{str(path)!r} has no safetensors file")
    plain: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedWeight] = {}
    for name, parts in _modules_of(files):
        if not is_quantized(parts):
            plain |= {f"{name}.{leaf}" if name else leaf: t for leaf, t in parts.items()}
            continue
        try:
            quantized[name] = read(LinearParts(parts), dtype).to(device)
        except (KeyError, ValueError) as error:
            raise ModelError(f"{name} of {str(path)!r} cannot be read: {error}") from error
        if "bias" in parts:
            plain[f"{name}.bias"] = parts["bias"]
    model = _empty_model(path, dtype)
    _fill(model, plain, quantized)
    install_quantized(model, quantized)
    return model


def _modules_of(files: list[Path]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each module's mapped tensors, by the last part of their names."""
    where: dict[str, dict[str, Path]] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                name, _, leaf = key.rpartition(".")
                where.setdefault(name, {})[leaf] = file
    for name, leaves in where.items():
        parts: dict[str, Tensor] = {}
        for file in dict.fromkeys(leaves.values()):
            with safe_open(file, "pt") as opened:
                parts |= {
                    leaf: opened.get_tensor(f"{name}.{leaf}" if name else leaf)
                    for leaf, other in leaves.items()
                    if other == file
                }
        yield name, parts


def _empty_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model without values, whose parameters take no memory yet."""
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(plain_config(path), dtype=dtype)
    if (generation := generation_config(path)) is not None:
        model.generation_config = generation
    return model


def _fill(
    model: PreTrainedModel, plain: Mapping[str, Tensor], quantized: Mapping[str, QuantizedWeight]
) -> None:
    """Copy the plain tensors. Raises ModelError for missing or unexpected tensors."""
    modules = dict(model.named_modules())
    for name, weight in quantized.items():
        module = modules.get(name)
        shape = None if not isinstance(module, nn.Linear) else tuple(module.weight.shape)
        if shape != weight.shape:
            raise ModelError(
                f"the checkpoint has a quantised {name} {list(weight.shape)}; the model has "
                f"{'no such linear' if shape is None else list(shape)}"
            )
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    keys = model.load_state_dict(dict(plain), strict=False)
    expected = {f"{name}.weight" for name in quantized} | tied
    missing = sorted(set(keys.missing_keys) - expected)
    unexpected = [k for k in keys.unexpected_keys if not k.endswith("rotary_emb.inv_freq")]
    if missing or unexpected:
        raise ModelError(
            "the quantised checkpoint does not fit its model: "
            + "; ".join(
                f"{word} {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
                for word, names in (("it lacks", missing), ("no place for", unexpected))
                if names
            )
        )
    model.tie_weights()
