"""Llama-style decoder layers as a straight list of kernels.

The weights and the arithmetic are those of transformers' modules. Without their small operators, a
decode step of a small model costs half as much on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from loraplex_kernels.layers.flashinfer_attention import CapturedAttention, PlannedAttention
from loraplex_kernels.layers.model_ops import norm_heads, paged_attention, rope_and_cache
from loraplex_kernels.lora.native_decoder import (
    DecoderLayer,
    DecoderLinear,
    DecoderRows,
    NativeDecoder,
    Norm,
)
from loraplex_kernels.lora.ops import PreparedTarget

from .adapted_modules import RmsNorm
from .attention import LayerAttention
from .forward_context import ForwardContext
from .packed_experts import PackedExperts
from .packed_lora_linear import PackedLoraLinear
from .routed import RoutedMlp

_FUSABLE = ("llama", "mistral", "qwen2", "qwen3")  # pre-norm, rotary, SiLU-gated MLP
_MIXTURES = ("mixtral", "qwen3_moe")  # the same with experts, for which a captured step would wait


class _SeparateQkv:
    """The products q, k and v of a base that does not pack them."""

    def __init__(self, parts: Sequence[PackedLoraLinear]) -> None:
        self._parts = tuple(parts)

    @property
    def lora(self) -> PreparedTarget | None:
        """The adapters of q, which are attached together with those of k and v."""
        return self._parts[0].lora

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``x`` [T, hidden_size] to the three products side by side."""
        return torch.cat([part(x) for part in self._parts], dim=1)

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the three products side by side to ``out``."""
        out.copy_(self(x))


class _MixtureMlp:
    """A block of router and experts, which runs as transformers' module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def run(self, hidden: Tensor) -> Tensor:
        """Map ``hidden`` [n_rows, hidden_size] to the same shape."""
        out: Tensor = self._module(hidden.unsqueeze(0))
        return out.squeeze(0)


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: PackedLoraLinear | _SeparateQkv
    out: PackedLoraLinear
    mlp: RoutedMlp | _MixtureMlp
    input_norm: RmsNorm
    mlp_norm: RmsNorm
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    cache: LayerAttention
    scale: float
    window: int | None


def is_fusable(config: PretrainedConfig, *, mixtures: bool = False) -> bool:
    """Return True if the layers of such a base can run as this list of kernels.

    ``mixtures``: also with experts.
    """
    kinds = (*_FUSABLE, *_MIXTURES) if mixtures else _FUSABLE
    return config.model_type in kinds and getattr(config, "hidden_act", "") == "silu"


@dataclass(frozen=True, slots=True)
class PieceRows:
    """The buffers between the pieces of a step; each [n_rows, …]."""

    residual: Tensor  # [n_rows, hidden_size]; the embeddings before the first piece
    qkv: Tensor  # [n_rows, (n_heads + 2 n_kv_heads) · head_dim]
    attended: Tensor  # [n_rows, n_heads · head_dim]
    hidden: Tensor  # [n_rows, hidden_size], normed, after the last piece

    def first(self, n_rows: int) -> PieceRows:
        """Return views of the first rows."""
        parts = (self.residual, self.qkv, self.attended, self.hidden)
        return PieceRows(*(part[:n_rows] for part in parts))


class FusedDecoder:
    """Runs the decoder layers of one model instance. Engine thread only."""

    def __init__(
        self,
        layers: Sequence[_Layer],
        norm: RmsNorm,
        cos: Tensor,
        sin: Tensor,
        step: ForwardContext,
        n_heads: int,
        n_kv_heads: int,
    ) -> None:
        self._layers = tuple(layers)
        self._norm = norm
        self._cos = cos  # [max_positions, head_dim]
        self._sin = sin
        self._step = step
        self._n_heads = n_heads
        self._n_kv_heads = n_kv_heads
        self._head_dim = cos.shape[1]
        self._native: NativeDecoder | None = None
        self._native_key: tuple[object, ...] = ()  # the cache and pool of ``_native``

    @staticmethod
    def of(
        decoder: PreTrainedModel,
        layer_names: Sequence[str],
        groups: Mapping[str, PackedLoraLinear],
        mlps: Mapping[str, RoutedMlp],
        attention: Sequence[LayerAttention],
        step: ForwardContext,
        max_positions: int,
    ) -> FusedDecoder | None:
        """Return the layers of ``decoder``; None if the architecture is not fusable."""
        config = decoder.config
        packs_experts = any(isinstance(module, PackedExperts) for module in decoder.modules())
        if not is_fusable(config, mixtures=packs_experts):
            return None
        rotary = decoder.rotary_emb
        if any(
            layer.spec.softcap is not None or layer.spec.sinks is not None for layer in attention
        ):
            return None
        # Up to ``max_positions`` the angles of every kind of RoPE are the same in every batch.
        positions = torch.arange(max_positions, device=next(decoder.parameters()).device)
        probe = next(decoder.parameters())[:1].float()  # cos and sin stay float32
        cos, sin = rotary(probe, position_ids=positions.unsqueeze(0))
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        if cos.shape[-1] != head_dim:
            return None
        by_module = {name: group for group in groups.values() for name in group.module_names}
        layers = [
            _layer_of(layer, name, by_module, mlps, cache)
            for layer, name, cache in zip(decoder.layers, layer_names, attention, strict=True)
        ]
        return FusedDecoder(
            layers,
            decoder.norm,
            cos.squeeze(0).contiguous(),
            sin.squeeze(0).contiguous(),
            step,
            attention[0].spec.n_heads,
            attention[0].spec.n_kv_heads,
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map embeddings [T, hidden_size] to the normed hidden states of ``step.logits_rows``.

        Changes its input. Takes one native call, interrupted for MLPs with routed experts, unless a
        row has fallback parts or experts of projections.
        """
        step = self._step
        if not step.fallback and not step.routes_projections:
            native = self._bind_native()
            rows = DecoderRows(
                step.positions, step.slot_mapping, step.page_table, step.query_starts, step.kv_lens
            )
            if native is not None and native.takes(hidden, rows):
                mlps = self._routed_mlps()
                if not mlps:
                    return native(hidden, rows, step.segments, logits_rows=step.logits_rows)
                return step.keep(native(hidden, rows, step.segments, mlps))
        return step.keep(self.run_by_layer(hidden))

    def run_by_layer(self, hidden: Tensor) -> Tensor:
        """Compute all rows operator by operator, on any device and with any adapters."""
        residual, step = hidden, self._step
        x: Tensor = self._layers[0].input_norm(residual)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(x)
            self._rotate_and_cache(layer, qkv)
            attended = qkv.new_empty(qkv.shape[0], self._n_heads * self._head_dim)
            tables = step.page_table, step.query_starts, step.kv_lens
            self._attend(layer, qkv, *tables, planned=step.planned_attention, out=attended)
            x = self._after_attention(index, attended, residual)
        return x

    @property
    def n_layers(self) -> int:
        return len(self._layers)

    def new_rows(self, n_rows: int) -> PieceRows:
        """Return zeroed buffers for ``n_rows`` rows."""
        like, width = self._cos, self._n_heads * self._head_dim
        dtype, hidden_size = self._norm.weight.dtype, self._norm.weight.shape[0]
        qkv_width = width + 2 * self._n_kv_heads * self._head_dim
        widths = (hidden_size, qkv_width, width, hidden_size)
        return PieceRows(*(like.new_zeros(n_rows, width, dtype=dtype) for width in widths))

    def run_piece(self, index: int, rows: PieceRows) -> None:
        """Run the operators between the attention of layers ``index`` − 1 and ``index``.

        There are ``n_layers`` + 1 pieces. Shapes depend only on the number of rows, so a CUDA graph
        can replay a piece. Reads the step's positions, KV slots and adapters.
        """
        if index == 0:
            x: Tensor = self._layers[0].input_norm(rows.residual)
        else:
            x = self._after_attention(index - 1, rows.attended, rows.residual)
        if index == len(self._layers):
            rows.hidden.copy_(x)
            return
        layer = self._layers[index]
        layer.qkv.into(x, rows.qkv)
        self._rotate_and_cache(layer, rows.qkv)

    def attend(
        self,
        index: int,
        rows: PieceRows,
        page_table: Tensor,
        query_starts: Tensor,
        kv_lens: Tensor,
        planned: PlannedAttention | CapturedAttention | None = None,
    ) -> None:
        """Run the attention of layer ``index``, between two pieces."""
        layer = self._layers[index]
        tables = page_table, query_starts, kv_lens
        self._attend(layer, rows.qkv, *tables, planned=planned, out=rows.attended)

    def _after_attention(self, index: int, attended: Tensor, residual: Tensor) -> Tensor:
        """Run the rest of a layer and the next norm. Adds to ``residual`` in place."""
        layer = self._layers[index]
        is_last = index + 1 == len(self._layers)
        next_norm = self._norm if is_last else self._layers[index + 1].input_norm
        x = layer.mlp_norm.add_and_norm(layer.out(attended), residual)
        return next_norm.add_and_norm(layer.mlp.run(x), residual)

    def _routed_mlps(self) -> dict[int, Callable[[Tensor], Tensor]]:
        """Return the MLPs of layers that route rows of the step."""
        routed = self._step.routed
        if not routed:
            return {}
        return {
            i: layer.mlp.run
            for i, layer in enumerate(self._layers)
            if isinstance(layer.mlp, RoutedMlp) and layer.mlp.name in routed
        }

    def _bind_native(self) -> NativeDecoder | None:
        """Return the native layers, rebuilt when a cache or an adapter pool is attached."""
        first = self._layers[0]
        key = (first.cache.keys, first.qkv.lora)
        if self._native_key != () and all(
            a is b for a, b in zip(self._native_key, key, strict=True)
        ):
            return self._native
        self._native_key = key
        layers = [_native_layer(layer) for layer in self._layers]
        norm = Norm(self._norm.weight, self._norm.eps)
        native = [layer for layer in layers if layer is not None]
        parts = native, norm, self._cos, self._sin, self._n_heads
        serves = len(native) == len(layers) and NativeDecoder.serves(*parts)
        self._native = NativeDecoder(*parts) if serves else None
        return self._native

    def _rotate_and_cache(self, layer: _Layer, qkv: Tensor) -> None:
        """Norm the heads, rotate them in place, and write keys and values to the cache."""
        keys, values = _attached(layer)
        if layer.q_norm is not None and layer.k_norm is not None:
            self._norm_heads(qkv, layer.q_norm, layer.k_norm)
        step = self._step
        tables = self._cos, self._sin, step.positions
        rope_and_cache(qkv, *tables, keys, values, step.slot_mapping)

    def _attend(
        self,
        layer: _Layer,
        qkv: Tensor,  # [T, (n_heads + 2 n_kv_heads) · head_dim]
        page_table: Tensor,
        query_starts: Tensor,
        kv_lens: Tensor,
        *,
        planned: PlannedAttention | CapturedAttention | None,
        out: Tensor,  # [T, n_heads · head_dim]
    ) -> None:
        keys, values = _attached(layer)
        n_tokens, width = out.shape
        paged_attention(
            qkv[:, :width].view(n_tokens, self._n_heads, self._head_dim),
            keys,
            values,
            page_table,
            query_starts,
            kv_lens,
            scale=layer.scale,
            window=layer.window,
            out=out.view(n_tokens, self._n_heads, self._head_dim),
            planned=planned,
            batch_invariant=self._step.batch_invariant,
        )

    def _norm_heads(self, qkv: Tensor, q_norm: RmsNorm, k_norm: RmsNorm) -> None:
        """Norm each head of q and k before the rotation, as Qwen3 does."""
        if not (q_norm.is_own_anywhere or k_norm.is_own_anywhere) and _alike(q_norm, k_norm):
            n_heads, n_kv_heads = self._n_heads, self._n_kv_heads
            weights = q_norm.weight, k_norm.weight
            norm_heads(qkv, *weights, q_norm.eps, n_heads=n_heads, n_kv_heads=n_kv_heads)
            return
        n_q, n_k = self._n_heads * self._head_dim, self._n_kv_heads * self._head_dim
        for columns, norm in ((slice(0, n_q), q_norm), (slice(n_q, n_q + n_k), k_norm)):
            heads = qkv[:, columns].reshape(qkv.shape[0], -1, self._head_dim).contiguous()
            qkv[:, columns] = norm(heads).flatten(1)


def _alike(q_norm: RmsNorm, k_norm: RmsNorm) -> bool:
    """Return True if one launch can do both norms."""
    return q_norm.eps == k_norm.eps and q_norm.offset == k_norm.offset == 0.0


def _attached(layer: _Layer) -> tuple[Tensor, Tensor]:
    keys, values = layer.cache.keys, layer.cache.values
    if keys is None or values is None:
        raise RuntimeError("the KV cache is not attached")
    return keys, values


def _native_layer(layer: _Layer) -> DecoderLayer | None:
    """Return the native layer; None with norms of heads, experts, other ranks or no cache yet."""
    keys, values = layer.cache.keys, layer.cache.values
    if keys is None or values is None or layer.q_norm is not None or layer.k_norm is not None:
        return None
    if layer.out.reduce is not None or isinstance(layer.mlp, _MixtureMlp):
        return None
    if isinstance(layer.qkv, _SeparateQkv):
        return None
    return DecoderLayer(
        input_norm=Norm(layer.input_norm.weight, layer.input_norm.eps),
        qkv=_native_linear(layer.qkv),
        keys=keys,
        values=values,
        scale=layer.scale,
        window=layer.window,
        out=_native_linear(layer.out),
        mlp_norm=Norm(layer.mlp_norm.weight, layer.mlp_norm.eps),
        gate_up=_native_linear(layer.mlp.gate_up),
        down=_native_linear(layer.mlp.down),
    )


def _native_linear(group: PackedLoraLinear) -> DecoderLinear:
    return DecoderLinear(group.packed, group.lora)


def _layer_of(
    layer: Any,
    name: str,
    by_module: Mapping[str, PackedLoraLinear],
    mlps: Mapping[str, RoutedMlp],
    cache: LayerAttention,
) -> _Layer:
    attention = layer.self_attn
    parts = [by_module[f"{name}.self_attn.{part}_proj"] for part in "qkv"]
    return _Layer(
        qkv=parts[0] if parts[0] is parts[2] else _SeparateQkv(parts),
        out=by_module[f"{name}.self_attn.o_proj"],
        mlp=mlps[f"{name}.mlp"] if f"{name}.mlp" in mlps else _MixtureMlp(layer.mlp),
        input_norm=layer.input_layernorm,
        mlp_norm=layer.post_attention_layernorm,
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        cache=cache,
        scale=cache.spec.scale,
        window=cache.spec.window,
    )
