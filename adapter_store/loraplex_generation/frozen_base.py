"""A frozen Llama or Qwen2 that runs many B-only adapters in one forward, for training on CPU.

The weights stay in bfloat16 and take no gradient; the gradient of the loss flows through them only
down to the lowest adapted layer, and only answer positions pass the output head.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .base_weights import BaseWeights, FileWeights, FrozenLinear
from .layout import PROJECTIONS, AdapterLayout, BaseShape
from .packing import PackedBatch
from .rms_norm import rms_norm
from .rotary import rotary_of, rotated
from .row_attention import RowPlan, attend

__all__ = ["Adapters", "FrozenBase", "LoraFA", "Scores", "base_fingerprint"]


class Adapters(Protocol):
    """The deltas that a group of rows per adapter gets, in the layers from `first_layer` up."""

    @property
    def first_layer(self) -> int: ...

    def qkv(self, x: Tensor, layer: int) -> Tensor:
        """[n_adapters, length, hidden] → what q, k and v add, side by side."""

    def o(self, x: Tensor, layer: int) -> Tensor:
        """The same for the output projection."""


class Scores(NamedTuple):
    nll: Tensor  # [n_targets], natural log
    hit: Tensor  # bool [n_targets]: the target is the most likely token


_QKV_BIAS = {"llama": False, "qwen2": True}  # the bases that this forward computes


class _Layer(NamedTuple):
    qkv: FrozenLinear
    o: FrozenLinear
    gate_up: FrozenLinear
    down: FrozenLinear
    attention_norm: Tensor
    mlp_norm: Tensor
    qkv_bias: Tensor | None  # [Σ out]


class FrozenBase:
    """Loads `config.json` and `model.safetensors` of a model directory.

    `weights`: read them there, in `dtype`, instead of the file. `mapped`: see ``FileWeights``.
    Not thread-safe while gradients are recorded; otherwise stateless.
    """

    def __init__(
        self,
        directory: Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        mapped: bool = False,
        weights: BaseWeights | None = None,
    ) -> None:
        config = json.loads((directory / "config.json").read_text())
        _check_layers(directory, config)
        has_qkv_bias = _QKV_BIAS[config["model_type"]]
        heads = config["num_attention_heads"]
        self.shape = BaseShape(
            n_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            n_heads=heads,
            n_kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        )
        self.dtype = dtype
        self.fingerprint = base_fingerprint(directory)
        self._eps = float(config["rms_norm_eps"])
        self._rotary, self._max_positions = rotary_of(directory)
        weights = weights or FileWeights(directory, dtype, mapped=mapped)
        self._embed = weights.tensor("model.embed_tokens.weight")
        is_tied = config.get("tie_word_embeddings", False)
        self._head = weights.tied(self._embed) if is_tied else weights.linear(["lm_head"])
        self._norm = weights.tensor("model.norm.weight")
        self._layers = [_layer(weights, i, has_qkv_bias) for i in range(self.shape.n_layers)]

    @property
    def n_positions(self) -> int:
        """Tokens that a row may have, with all that it sees before it."""
        return self._max_positions

    @property
    def output_head(self) -> Tensor:
        """[vocabulary, hidden]. Do not write to it."""
        return self._head.matrix()

    def projection(self, layer: int, name: str) -> Tensor:
        """The weight of one attention projection, float32 [out, in]; a copy."""
        if name == "o_proj":
            return self._layers[layer].o.matrix().float()
        sizes = [self.shape.out_features(p) for p in ("q_proj", "k_proj", "v_proj")]
        q, k, v = torch.split(self._layers[layer].qkv.matrix(), sizes)
        return {"q_proj": q, "k_proj": k, "v_proj": v}[name].float()

    def hidden(
        self, batch: PackedBatch, adapters: Adapters | None = None, below: Tensor | None = None
    ) -> Tensor:
        """Final-norm hidden states [n_adapters, length, hidden]; None runs the base.

        `below`: what `self.below` gives for the batch, if that is known.
        """
        rope = self._rope(batch.positions)
        start = self.shape.n_layers if adapters is None else adapters.first_layer
        h = self.below(batch, start) if below is None else below
        for i in range(start, self.shape.n_layers):
            h = self._block(h, i, batch.plan, rope, adapters)
        return rms_norm(h, self._norm, self._eps)

    @torch.no_grad()
    def below(self, batch: PackedBatch, n_layers: int) -> Tensor:
        """What the first layers make of the batch, [n_adapters, length, hidden], no adapter on."""
        rope = self._rope(batch.positions)
        h = F.embedding(batch.tokens, self._embed)
        for i in range(n_layers):
            h = self._block(h, i, batch.plan, rope, None)
        return h

    def score(
        self, batch: PackedBatch, adapters: Adapters | None = None, below: Tensor | None = None
    ) -> Scores:
        """Negative log-likelihood of every answer token; `below` as `hidden` has it."""
        h = self.hidden(batch, adapters, below)
        picked = h.reshape(-1, h.shape[-1])[batch.source]
        logits = self._head(picked).float()
        nll = F.cross_entropy(logits, batch.target, reduction="none")
        return Scores(nll, logits.detach().argmax(-1) == batch.target)

    @torch.no_grad()
    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [n_adapters · length, 1, head_dim], as transformers' module makes them."""
        longest = int(positions.max()) + 1
        if longest > self._max_positions:
            raise ValueError(
                f"a row of {longest} tokens is longer than the base's {self._max_positions} "
                "positions; give shorter ones"
            )
        probe = torch.empty(0, dtype=self.dtype)  # tells the dtype
        cos, sin = self._rotary(probe, positions)
        return cos.flatten(0, 1).unsqueeze(1), sin.flatten(0, 1).unsqueeze(1)

    def _block(
        self, h: Tensor, i: int, plan: RowPlan, rope: tuple[Tensor, Tensor], lora: Adapters | None
    ) -> Tensor:
        shape, layer = self.shape, self._layers[i]
        n, length, _ = h.shape
        x = rms_norm(h, layer.attention_norm, self._eps)
        qkv = layer.qkv(x)
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        if lora is not None:
            qkv = qkv + lora.qkv(x, i)
        n_q, n_kv = shape.n_heads, shape.n_kv_heads
        heads = qkv.view(n * length, n_q + 2 * n_kv, shape.head_dim)
        o = attend(rotated(heads, *rope, n_q + n_kv), plan, n_q, n_kv).view(n, length, -1)
        y = layer.o(o)
        if lora is not None:
            y = y + lora.o(o, i)
        h = h + y
        x = rms_norm(h, layer.mlp_norm, self._eps)
        gate, up = layer.gate_up(x).chunk(2, -1)
        return h + layer.down(F.silu(gate) * up)


def _layer(weights: BaseWeights, i: int, has_qkv_bias: bool) -> _Layer:
    stem = f"model.layers.{i}"
    attention, mlp = f"{stem}.self_attn", f"{stem}.mlp"
    biases = [weights.tensor(f"{attention}.{p}_proj.bias") for p in "qkv" if has_qkv_bias]
    return _Layer(
        qkv=weights.linear([f"{attention}.{p}_proj" for p in "qkv"]),
        o=weights.linear([f"{attention}.o_proj"]),
        gate_up=weights.linear([f"{mlp}.{p}_proj" for p in ("gate", "up")]),
        down=weights.linear([f"{mlp}.down_proj"]),
        attention_norm=weights.tensor(f"{stem}.input_layernorm.weight"),
        mlp_norm=weights.tensor(f"{stem}.post_attention_layernorm.weight"),
        qkv_bias=torch.cat(biases) if has_qkv_bias else None,
    )


def _check_layers(directory: Path, config: dict[str, object]) -> None:
    """Raises ValueError for what this forward does not do."""
    if config["model_type"] not in _QKV_BIAS:
        raise ValueError(
            f"{directory} is a {config['model_type']!r} model; the zoo trains on "
            f"{' and '.join(map(repr, _QKV_BIAS))} bases"
        )
    expected = {
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }
    for name, wanted in expected.items():
        value = config.get(name, wanted)
        if value != wanted:
            raise ValueError(
                f"{directory} has {name} {value!r}; the zoo trains on bases with {wanted!r}"
            )


def base_fingerprint(directory: Path) -> str:
    """Identity of the weights: a hash of the file's size, header and a sample of its bytes."""
    path = directory / "model.safetensors"
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(path.stat().st_size // 2)
        digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]


class LoraFA:
    """Many adapters of one layout, `vectors` [n_adapters, layout.size]: A is shared by all.

    Or [n_adapters, layout.full_size]: each has its own.
    """

    def __init__(self, layout: AdapterLayout, vectors: Tensor, dtype: torch.dtype) -> None:
        self.layout = layout
        self.first_layer = layout.first_layer
        b = vectors[:, : layout.size].to(dtype)
        n = len(vectors)
        factors = iter(torch.split(b, layout.b_sizes, 1))
        self._b: dict[tuple[int, str], Tensor] = {}
        for layer in layout.layers:
            for p in PROJECTIONS:
                out = layout.shape.out_features(p)
                # transposed: [n, rank, out], so that a row times it is the delta
                self._b[layer, p] = next(factors).view(n, out, layout.rank).transpose(1, 2)
        a = layout.frozen_a()
        if vectors.shape[1] > layout.size:
            moved = torch.split(vectors[:, layout.size :], layout.a_sizes, 1)
            pairs = zip(a.items(), moved, strict=True)
            a = {key: frozen + part.view(n, *frozen.shape) for (key, frozen), part in pairs}
        # scaled, [in, Σ rank] or [n, in, Σ rank]
        self._a_qkv = {
            layer: _transposed([a[layer, p] for p in PROJECTIONS[:3]], layout.scale, dtype)
            for layer in layout.layers
        }
        self._a_o = {
            layer: _transposed([a[layer, "o_proj"]], layout.scale, dtype) for layer in layout.layers
        }

    def qkv(self, x: Tensor, layer: int) -> Tensor:
        parts = torch.split(x @ self._a_qkv[layer], self.layout.rank, -1)
        return torch.cat(
            [u @ self._b[layer, p] for u, p in zip(parts, PROJECTIONS[:3], strict=True)], -1
        )

    def o(self, x: Tensor, layer: int) -> Tensor:
        return x @ self._a_o[layer] @ self._b[layer, "o_proj"]


def _transposed(parts: list[Tensor], scale: float, dtype: torch.dtype) -> Tensor:
    return (torch.cat(parts, -2) * scale).to(dtype).transpose(-1, -2)
