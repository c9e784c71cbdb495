"""The frozen base: a transformers model whose attention, linears and norms are replaced."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_kernels.formats.quantized_weight import WeightFormat
from loraplex_kernels.layers.model_ops import silu_mul
from loraplex_kernels.lora.ops import PreparedTarget
from loraplex_kernels.lora.pool import LoraPool

from .errors import ModelError, UnsupportedBase
from .gguf.gguf_folder import GGUF_FILE
from .gguf.gguf_model import load_gguf
from .layers.adapted_experts import replace_experts
from .layers.adapted_modules import replace_embeddings, replace_norms
from .layers.attention import LayerAttention, install_attention
from .layers.forward_context import ForwardContext
from .layers.fused_decoder import FusedDecoder
from .layers.packed_experts import is_silu, pack_experts
from .layers.packed_lora_linear import PackedLoraLinear
from .layers.routed import RoutedMlp, find_mlps
from .layers.tensor_parallel import GatheredHead, Shard
from .loading.loader import run_load
from .loading.served_spec import PackedSlice, served_spec
from .packing import replace_linears, table_of_base
from .quantized.quantized_modules import (
    coded_weight,
    load_quantized,
    quantization_config,
    quantization_of,
    quantize_linears,
)
from .self_check import Reference
from .tracing.model_trace import decoder_of, trace_model
from .vision.image_trunk import ImageReference, ImageTrunk
from .vision.layouts import VISION_LANGUAGE, auto_class


class BaseModel:
    """A base model whose modules apply adapters. Engine thread only after the build.

    ``forward`` reads its inputs from ``step``, except for the embeddings.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        model_id: str,
        *,
        fuse: bool = True,
        exponent_coding: bool = True,  # of weights, where that is faster (see ``PackedLinear``)
        self_check: bool = True,
        shard: Shard | None = None,  # if ``model`` has one rank's linears (``shard_loader``)
    ) -> None:
        """Takes over the instance and replaces its linears, norms and attention.

        Raises UnsupportedBase if a short run shows a feature that is not served. With
        ``self_check`` it also raises if the answers differ from those of transformers.
        """
        self.step = ForwardContext()
        config = model.config.get_text_config()
        self.model_type = str(config.model_type)
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.shard = shard
        if shard is not None:
            self.vocab_size = shard.layout.vocab_size
        layout = VISION_LANGUAGE.get(model.config.model_type)
        images: ImageReference | None = None
        with _named(model, model_id):
            trace = trace_model(model)
            reference = Reference.capture(model, trace) if self_check else None
            if layout is not None:
                images = ImageReference.capture(model, layout)
        self.max_positions = trace.max_positions
        self.eos_token_ids = _eos_token_ids(model)
        self.dtype = model.dtype
        self.device = model.device
        self._logits = trace.logits
        packed: dict[str, PackedSlice] = {}
        quantization = quantization_of(model)
        self.spec = served_spec(  # keeps no reference to the first spec, which holds all weights
            BaseSpec.of(model, model_id, quantization=quantization),
            model,
            packed,
            linears=trace.linears if images is None else trace.linears | images.linears,
            attention=next(iter(trace.attention.values())),
        )
        head_weight = coded_weight(model.get_output_embeddings())
        self._decoder = decoder_of(model)
        self.layers: list[LayerAttention] = install_attention(
            model, self._decoder, trace.attention, self.step
        )
        self.groups = replace_linears(
            model,
            self.spec,
            self.step,
            packed,
            within=trace.linears,
            exponent_coding=exponent_coding,
            shard=shard,
        )
        self.mlps: dict[str, RoutedMlp] = find_mlps(
            self.groups, lambda name: _gated_activation(model.get_submodule(name)), self.step
        )
        inside = ("",) if layout is None else (f"{_name_of(model, self._decoder)}.",)
        self.norms = replace_norms(model, self.step, within=inside)  # names
        head = self.groups[self.spec.output_head].packed
        table_of = partial(table_of_base, head=head, head_weight=head_weight)
        self.embeddings = replace_embeddings(  # names
            model, self.step, table_of, within=inside
        )
        pack_experts(model, exponent_coding=exponent_coding)
        # names of parameters
        self.stacked = replace_experts(model, self.step, self.spec.routers)
        if shard is not None:
            own = self.groups[self.spec.output_head]
            self.groups[own.target.name] = PackedLoraLinear(
                own.target.name, own.module_names, GatheredHead(own.packed, shard), self.step
            )
        self.head = self.groups[self.spec.output_head]
        for name, mlp in self.mlps.items():
            model.set_submodule(name, mlp)
        self._embedding = model.get_input_embeddings()
        self.routable = self._routable()
        self.images: ImageTrunk | None = None  # of a vision-language model
        if images is not None:
            self.images = self._adapt_images(model, images, packed, exponent_coding)
        self.fused: FusedDecoder | None = None  # None: transformers' modules run the layers
        if fuse:
            self.fused = FusedDecoder.of(
                self._decoder,
                trace.layer_names,
                self.groups,
                self.mlps,
                self.layers,
                self.step,
                self.max_positions,
            )
        self.n_kv_heads = self.spec.n_kv_heads
        self.head_dim = self.spec.head_dim
        if shard is not None and self.fused is None:
            raise UnsupportedBase(
                f"the base {model_id!r} ({type(model).__name__}) is not cut over several "
                "processes yet; serve it without --tensor-parallel-size"
            )
        if reference is not None:
            with _named(model, model_id):
                reference.check(self, model)
                if self.images is not None:
                    self.images.check()

    def _adapt_images(
        self,
        model: PreTrainedModel,
        reference: ImageReference,
        packed: dict[str, PackedSlice],
        exponent_coding: bool,
    ) -> ImageTrunk:
        """Replace the linears and norms of tower and projector, which have a step of their own."""
        step = ForwardContext()
        self.groups |= replace_linears(
            model,
            self.spec,
            step,
            packed,
            within=reference.linears,
            exponent_coding=exponent_coding,
        )
        parts = VISION_LANGUAGE[model.config.model_type].parts
        self.norms |= replace_norms(model, step, within=parts)
        return ImageTrunk(model, step, reference)

    def _routable(self) -> frozenset[str]:
        """Return the names of MLP blocks and projections that may have experts."""
        projections = {
            name
            for group in self.groups.values()
            if group is not self.head
            for name in group.module_names
        }
        return frozenset(projections | self.mlps.keys())

    def attach_pool(self, pool: LoraPool) -> None:
        """Make the linears apply the pool's adapters."""
        for group in self.groups.values():
            group.lora = PreparedTarget(pool, group.target.name)

    def attach_kv(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Sets the KV cache of every layer, on all ranks."""
        for layer, k, v in zip(self.layers, keys, values, strict=True):
            layer.keys, layer.values = k, v
        if self.shard is not None and self.shard.others is not None:
            n_pages, _, page_size, _ = keys[0].shape
            self.shard.others.attach_kv(n_pages, page_size)

    def new_kv(self, n_pages: int, page_size: int) -> list[Tensor]:
        """Return zeros [n_pages, n_kv_heads, page_size, head_dim] for every layer."""
        shape = (n_pages, self.n_kv_heads, page_size, self.head_dim)
        return [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.layers]

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings [T, hidden_size] of [T] tokens. The caller may change them."""
        embedded: Tensor = self._embedding(token_ids)
        return embedded

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the final normed hidden states [n, hidden_size] of ``step.logits_rows``.

        May reuse its input. On rank 0 of several, the other ranks run their parts.
        """
        layers = self.run_modules if self.fused is None else self.fused
        if self.shard is not None and self.shard.others is not None:
            with self.shard.others.step(self.step, embeddings):
                return layers(embeddings)
        return layers(embeddings)

    def run_modules(self, embeddings: Tensor) -> Tensor:
        """Run ``forward`` through transformers' modules, even if the layers are fused."""
        rope = self.step.rope_positions
        output = self._decoder(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=self.step.positions.unsqueeze(0) if rope is None else rope.unsqueeze(1),
            attention_mask=None,
            use_cache=False,
        )
        return self.step.keep(output.last_hidden_state.squeeze(0))

    @property
    def is_monotonic(self) -> bool:
        """Return True if logits have the order of the head's output, ties included."""
        return self._logits.is_monotonic

    def finish_logits(self, raw: Tensor, out: Tensor) -> Tensor:
        """Write the logits of the head's output ``raw`` to ``out`` float32 [n, vocab_size]."""
        return self._logits.finish(out.copy_(raw))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the base's logits, float32 [n, vocab_size], without adapters."""
        raw = self.head.packed(hidden)
        return self.finish_logits(raw, torch.empty_like(raw, dtype=torch.float32))


def load_base_model(
    path: Path,
    model_id: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    fuse: bool = True,
    exponent_coding: bool = True,
    self_check: bool = True,
    quantization: WeightFormat | None = None,
) -> BaseModel:
    """Load a causal LM from a directory. Raises ModelError with the reason if it cannot.

    ``quantization``: the format to quantise the linears to, one by one.
    """
    stored = quantization_config(path)
    if (stored is not None or (path / GGUF_FILE).exists()) and quantization is not None:
        raise ModelError(
            f"the model at {str(path)!r} is quantised already; leave --quantization out"
        )
    try:
        model = run_load(partial(_load, path, stored, dtype, device))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the model at {str(path)!r} cannot be loaded: {error}") from error
    model.eval().requires_grad_(False)
    if quantization is not None:
        try:
            quantize_linears(model, quantization, device)
        except ValueError as error:
            raise ModelError(f"the model at {str(path)!r} cannot be quantised: {error}") from error
    return BaseModel(
        model.to(device),
        model_id,
        fuse=fuse,
        exponent_coding=exponent_coding,
        self_check=self_check,
    )


def _load(
    path: Path, quantization: dict[str, Any] | None, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """``quantization``: of the checkpoint, see ``quantization_config``."""
    gguf = path / GGUF_FILE
    if gguf.exists():
        return load_gguf(gguf, path, dtype=dtype, device=device)
    if quantization is not None:
        return load_quantized(path, quantization, dtype=dtype, device=device)
    model: PreTrainedModel = auto_class(path).from_pretrained(
        path, dtype=dtype, local_files_only=True
    )
    return model


@contextlib.contextmanager
def _named(model: PreTrainedModel, model_id: str) -> Iterator[None]:
    """Adds the base's name to an UnsupportedBase."""
    try:
        yield
    except UnsupportedBase as error:
        raise UnsupportedBase(
            f"the base {model_id!r} ({type(model).__name__}) cannot be served: {error}"
        ) from error


def _name_of(model: nn.Module, part: nn.Module) -> str:
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[part]


def _gated_activation(mlp: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return a function act(gate) ⊙ up of [n, 2·ff]; None if the block has no ``act_fn``."""
    act = getattr(mlp, "act_fn", None)
    if act is None:
        return None
    if is_silu(act):
        return silu_mul

    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated: Tensor = act(gate) * up
        return activated

    return gated


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    for config in (model.generation_config, model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()
