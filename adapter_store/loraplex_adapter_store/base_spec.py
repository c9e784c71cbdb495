"""The frozen base model for readers of adapters: geometry, names and float32 weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLES_PER_PARAMETER = 256
# Models with two towers, whose table of tokens transformers does not name.
_TEXT_TABLES = {
    "clip": "text_model.embeddings.token_embedding",
    "siglip": "text_model.embeddings.token_embedding",
}


@dataclass(frozen=True, slots=True)
class LinearShape:
    in_features: int
    out_features: int
    has_bias: bool


@dataclass(frozen=True, slots=True)
class EmbeddingShape:
    n_rows: int
    width: int


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The base of a server. Immutable.

    ``weight``, ``bias`` and ``parameter`` copy to the host on call. ``stored`` does not, so that
    computations with a weight run on its device. Build the spec before any layer of the model is
    replaced, because module names are those of the checkpoint.
    """

    model_id: str
    model_type: str
    fingerprint: str  # same for every dtype the same weights are loaded in
    quantization: str | None  # of its linears, as "int8"; part of the fingerprint
    modules: Mapping[str, LinearShape]  # every linear and lm_head, but no routers of experts
    embeddings: Mapping[str, EmbeddingShape]
    parameters: Mapping[str, tuple[int, ...]]  # every parameter, as stored in the checkpoint
    weight: Callable[[str], Tensor]  # module name → float32 [out, in], or [n_rows, width]
    stored: Callable[[str], Tensor]  # module name → [out, in], the model's own
    bias: Callable[[str], Tensor | None]  # module name → float32 [out]
    parameter: Callable[[str], Tensor]  # parameter name → float32, as stored
    norms: Mapping[str, float]  # Frobenius norm of every linear's weight
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    hidden_act: str
    conv1d: frozenset[str]  # modules whose weight is stored as [in, out] (GPT-2)
    input_embedding: str  # module name, as "model.embed_tokens"; empty: it reads no tokens
    output_head: str  # module name, as "lm_head"
    # The linear of an encoder's labels, such as "classifier.out_proj". No field above has it.
    classifier: str = ""
    # Features of a text or an image, which the classifier reads; 0: as many as ``hidden_size``.
    feature_size: int = 0
    # Linears that only some of transformers' classes of this base have, as an encoder's pooler.
    optional: frozenset[str] = frozenset()

    @property
    def routers(self) -> frozenset[str]:
        """The modules that choose the base's own experts by one matrix [n_experts, in]."""
        blocks = {
            name.partition(".experts.")[0]
            for name, shape in self.parameters.items()
            if len(shape) == 3
        }
        matrices = (
            name.removesuffix(".weight")
            for name, shape in self.parameters.items()
            if name.endswith(".weight") and len(shape) == 2
        )
        return frozenset(
            module
            for module in matrices
            if module.rpartition(".")[0] in blocks
            and module not in self.modules
            and module not in self.embeddings
        )

    @staticmethod
    def of(model: PreTrainedModel, model_id: str, *, quantization: str | None = None) -> BaseSpec:
        """Build the spec of a transformers model.

        ``quantization``: the name of a quantization whose linears compute their weights on access.
        """
        config = model.config.get_text_config()
        linears, embeddings, conv1d = _modules_of(model)
        modules_by_name = dict(model.named_modules())

        def weight(name: str) -> Tensor:
            return stored(name).to("cpu", torch.float32, copy=True).contiguous()

        def stored(name: str) -> Tensor:
            value = read[f"{name}.weight"]()
            return value.t() if name in conv1d else value

        def bias(name: str) -> Tensor | None:
            value = read.get(f"{name}.bias")
            return None if value is None else value().to("cpu", torch.float32, copy=True)

        def parameter(name: str) -> Tensor:
            return read[name]().to("cpu", torch.float32, copy=True)

        # Tensors are captured now: the engine later swaps modules on the same instance.
        read = _readers(model)
        fingerprint, shapes = _fingerprint(read, quantization)
        embedding, head = _input_embedding(model), model.get_output_embeddings()
        names = {id(module): name for name, module in modules_by_name.items()}
        n_heads = int(config.num_attention_heads)
        return BaseSpec(
            model_id=model_id,
            model_type=str(config.model_type),
            fingerprint=fingerprint,
            quantization=quantization,
            modules=MappingProxyType(linears),
            embeddings=MappingProxyType(embeddings),
            # The order is the model's, by which PEFT nests several parameters of a module.
            parameters=MappingProxyType({name: shapes[name] for name in read}),
            weight=weight,
            stored=stored,
            bias=bias,
            parameter=parameter,
            norms=MappingProxyType({name: _norm(stored(name)) for name in linears}),
            n_layers=int(config.num_hidden_layers),
            hidden_size=int(config.hidden_size),
            n_heads=n_heads,
            n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // n_heads),
            vocab_size=0 if embedding is None else embedding.num_embeddings,
            tie_word_embeddings=not (head is None or embedding is None)
            and _are_tied(head, embedding),
            hidden_act=_hidden_act(config),
            conv1d=frozenset(conv1d),
            input_embedding="" if embedding is None else names[id(embedding)],
            output_head="" if head is None else names[id(head)],
        )


def _input_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """Return the table of the tokens; None for a model that reads images alone."""
    table = _TEXT_TABLES.get(model.config.model_type)
    embedding = model.get_input_embeddings() if table is None else model.get_submodule(table)
    return embedding if isinstance(embedding, nn.Embedding) else None


def _are_tied(head: nn.Module, embedding: nn.Module) -> bool:
    """Return True for one weight, plain or quantised."""
    quantized = getattr(head, "quantized", None)
    if quantized is not None:
        return quantized is getattr(embedding, "quantized", None)
    return head.weight is embedding.weight


def _readers(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Return name → reader of every parameter and of the weights that linears compute."""
    from transformers.pytorch_utils import Conv1D

    read: dict[str, Callable[[], Tensor]] = {
        name: partial(torch.Tensor.detach, value.data)
        for name, value in model.named_parameters(remove_duplicate=False)
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            read.setdefault(f"{name}.weight", partial(getattr, module, "weight"))
        for part, reader in getattr(module, "stacked_weights", {}).items():
            read[f"{name}.{part}"] = reader
    return read


def _norm(weight: Tensor) -> float:
    """Return the Frobenius norm, in float32 on the weight's device, some rows at a time."""
    parts = [
        torch.linalg.vector_norm(rows, dtype=torch.float32) for rows in torch.split(weight, 4096)
    ]
    return float(torch.linalg.vector_norm(torch.stack(parts)))


def _hidden_act(config: object) -> str:
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            return value
    return "silu"


def _modules_of(
    model: nn.Module,
) -> tuple[dict[str, LinearShape], dict[str, EmbeddingShape], set[str]]:
    from transformers.pytorch_utils import Conv1D

    linears: dict[str, LinearShape] = {}
    embeddings: dict[str, EmbeddingShape] = {}
    conv1d: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            has_bias = module.bias is not None
            linears[name] = LinearShape(module.in_features, module.out_features, has_bias)
        elif isinstance(module, Conv1D):
            n_in, n_out = module.weight.shape
            linears[name] = LinearShape(int(n_in), int(n_out), has_bias=True)
            conv1d.add(name)
        elif isinstance(module, nn.Embedding):
            embeddings[name] = EmbeddingShape(module.num_embeddings, module.embedding_dim)
    return linears, embeddings, conv1d


def _fingerprint(
    read: Mapping[str, Callable[[], Tensor]], quantization: str | None
) -> tuple[str, dict[str, tuple[int, ...]]]:
    """Return the sha256 of names, shapes and a sample of values in bfloat16, and the shapes."""
    digest = hashlib.sha256()
    if quantization is not None:
        digest.update(json.dumps({"quantization": quantization}).encode())
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(read):
        tensor = read[name]()
        shapes[name] = tuple(tensor.shape)
        flat = tensor.reshape(-1)
        stride = max(1, flat.numel() // _SAMPLES_PER_PARAMETER)
        sample = flat[::stride].to("cpu", torch.bfloat16).contiguous()
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest(), shapes
