"""Llama-style decoder layers as a straight list of kernels.

The same weights and the same arithmetic as transformers' modules, without their small operators:
what a decode step of a small model spends there would double its cost on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from loraplex_kernels.cpu.decoder import (
    DecoderLayer,
    DecoderLinear,
    DecoderRows,
    NativeDecoder,
    Norm,
)
from loraplex_kernels.flashinfer_attention import PlannedAttention
from loraplex_kernels.model_ops import norm_heads, paged_attention, rope_and_cache

from .attention import LayerAttention
from .forward_context import ForwardContext
from .norm import RmsNorm
from .packed_lora_linear import PackedLoraLinear
from .routed import RoutedMlp

__all__ = ["FusedDecoder", "PieceRows", "is_fusable"]

_FUSABLE = ("llama", "mistral", "qwen2", "qwen3")  # pre-norm, rotary, SiLU-gated MLP


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: PackedLoraLinear
    out: PackedLoraLinear
    mlp: RoutedMlp
    input_norm: RmsNorm
    mlp_norm: RmsNorm
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    cache: LayerAttention
    scale: float
    window: int | None


def is_fusable(config: PretrainedConfig) -> bool:
    """Whether the layers of such a base can run as this list of kernels."""
    return config.model_type in _FUSABLE and getattr(config, "hidden_act", "") == "silu"


@dataclass(frozen=True, slots=True)
class PieceRows:
    """What pieces of a step leave for those behind them; each [n_rows, …]."""

    residual: Tensor  # [n_rows, hidden_size]; before the first piece: the embeddings
    qkv: Tensor  # [n_rows, (n_heads + 2 n_kv_heads) · head_dim]
    attended: Tensor  # [n_rows, n_heads · head_dim]
    hidden: Tensor  # [n_rows, hidden_size], normed, behind the last piece

    def first(self, n_rows: int) -> PieceRows:
        """Views of the first rows."""
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
        self._native_of: tuple[object, ...] = ()  # what `_native` was made for

    @staticmethod
    def of(
        decoder: PreTrainedModel,
        groups: Mapping[str, PackedLoraLinear],
        mlps: Mapping[str, RoutedMlp],
        attention: Sequence[LayerAttention],
        step: ForwardContext,
        max_positions: int,
    ) -> FusedDecoder | None:
        """None if the architecture is not one of the fusable ones."""
        config = decoder.config
        if not is_fusable(config):
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
        prefix = "model.layers"
        layers = [
            _layer_of(layer, f"{prefix}.{index}", by_module, mlps, attention[index])
            for index, layer in enumerate(decoder.layers)
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
        """Embeddings [T, hidden_size] → normed hidden states of the step's logits_indices rows.

        Changes its input (the residual). In one native call, but for MLPs with routed experts,
        where no row goes module by module.
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
        """All rows, operator by operator: on any device, with every kind of row."""
        residual, step = hidden, self._step
        x: Tensor = self._layers[0].input_norm(residual)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(x)
            self._rotate_and_cache(layer, qkv)
            attended = qkv.new_empty(qkv.shape[0], self._n_heads * self._head_dim)
            tables = step.page_table, step.query_starts, step.kv_lens
            self._attend(layer, qkv, *tables, planned=step.planned_attention, out=attended)
            x = self._behind_attention(index, attended, residual)
        return x

    @property
    def n_layers(self) -> int:
        return len(self._layers)

    def new_rows(self, n_rows: int) -> PieceRows:
        """Room for ``n_rows`` rows between pieces; zeroed."""
        like, width = self._cos, self._n_heads * self._head_dim
        dtype, hidden_size = self._norm.weight.dtype, self._norm.weight.shape[0]
        qkv_width = width + 2 * self._n_kv_heads * self._head_dim
        widths = (hidden_size, qkv_width, width, hidden_size)
        return PieceRows(*(like.new_zeros(n_rows, width, dtype=dtype) for width in widths))

    def run_piece(self, index: int, rows: PieceRows) -> None:
        """What stands between the attention of layer ``index`` − 1 and that of layer ``index``.

        There are ``n_layers`` + 1 pieces. Reads the step's positions, KV slots and adapters; shapes
        depend on the number of rows alone, so a CUDA graph may replay it.
        """
        if index == 0:
            x: Tensor = self._layers[0].input_norm(rows.residual)
        else:
            x = self._behind_attention(index - 1, rows.attended, rows.residual)
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
        planned: PlannedAttention | None = None,
    ) -> None:
        """Attention of layer ``index``, between two pieces."""
        layer = self._layers[index]
        tables = page_table, query_starts, kv_lens
        self._attend(layer, rows.qkv, *tables, planned=planned, out=rows.attended)

    def _behind_attention(self, index: int, attended: Tensor, residual: Tensor) -> Tensor:
        """The rest of a layer, and the norm before the next; ``residual`` is added to in place."""
        layer = self._layers[index]
        is_last = index + 1 == len(self._layers)
        next_norm = self._norm if is_last else self._layers[index + 1].input_norm
        x = layer.mlp_norm.add_and_norm(layer.out(attended), residual)
        return next_norm.add_and_norm(layer.mlp.run(x), residual)

    def _routed_mlps(self) -> dict[int, Callable[[Tensor], Tensor]]:
        """Of the layers in which some row of the step routes."""
        routed = self._step.routed
        if not routed:
            return {}
        return {
            i: layer.mlp.run for i, layer in enumerate(self._layers) if layer.mlp.name in routed
        }

    def _bind_native(self) -> NativeDecoder | None:
        """The layers for native code, made anew when a cache or an adapter pool is attached."""
        first = self._layers[0]
        made_for = (first.cache.keys, first.qkv.lora)
        if self._native_of != () and all(
            a is b for a, b in zip(self._native_of, made_for, strict=True)
        ):
            return self._native
        self._native_of = made_for
        layers = [_native_layer(layer) for layer in self._layers]
        norm = Norm(self._norm.weight, self._norm.eps)
        known = [layer for layer in layers if layer is not None]
        self._native = (
            NativeDecoder(known, norm, self._cos, self._sin, self._n_heads)
            if len(known) == len(layers)
            and NativeDecoder.serves(known, norm, self._cos, self._sin, self._n_heads)
            else None
        )
        return self._native

    def _rotate_and_cache(self, layer: _Layer, qkv: Tensor) -> None:
        """Norms of heads, rotation in place, keys and values into the cache."""
        keys, values = _attached(layer)
        if layer.q_norm is not None and layer.k_norm is not None:
            self._norm_heads(qkv, layer.q_norm, layer.k_norm)
        rope_and_cache(
            qkv,
            self._cos,
            self._sin,
            self._step.positions,
            keys,
            values,
            self._step.slot_mapping,
            n_heads=self._n_heads,
            n_kv_heads=self._n_kv_heads,
            head_dim=self._head_dim,
        )

    def _attend(
        self,
        layer: _Layer,
        qkv: Tensor,  # [T, (n_heads + 2 n_kv_heads) · head_dim]
        page_table: Tensor,
        query_starts: Tensor,
        kv_lens: Tensor,
        *,
        planned: PlannedAttention | None,
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
        """Qwen3 norms each head of q and k before the rotation."""
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
    """Whether one launch can do both."""
    return q_norm.eps == k_norm.eps and q_norm.offset == k_norm.offset == 0.0


def _attached(layer: _Layer) -> tuple[Tensor, Tensor]:
    keys, values = layer.cache.keys, layer.cache.values
    if keys is None or values is None:
        raise RuntimeError("the KV cache is not attached")
    return keys, values


def _native_layer(layer: _Layer) -> DecoderLayer | None:
    """None if native code has no such layer (Qwen3's norms of heads; a layer that other ranks have
    parts of), or it is not attached yet."""
    keys, values = layer.cache.keys, layer.cache.values
    if keys is None or values is None or layer.q_norm is not None or layer.k_norm is not None:
        return None
    if layer.out.reduce is not None:
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
    return _Layer(
        qkv=by_module[f"{name}.self_attn.q_proj"],
        out=by_module[f"{name}.self_attn.o_proj"],
        mlp=mlps[f"{name}.mlp"],
        input_norm=layer.input_layernorm,
        mlp_norm=layer.post_attention_layernorm,
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        cache=cache,
        scale=cache.spec.scale,
        window=cache.spec.window,
    )
