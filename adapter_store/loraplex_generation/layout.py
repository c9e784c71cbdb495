"""What a generated adapter is made of: which projections, which rank, which frozen A."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["PROJECTIONS", "AdapterLayout", "BaseShape"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class BaseShape:
    """The sizes of a Llama-like base that a layout depends on."""

    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int

    def in_features(self, projection: str) -> int:
        return self.n_heads * self.head_dim if projection == "o_proj" else self.hidden_size

    def out_features(self, projection: str) -> int:
        heads = {"q_proj": self.n_heads, "k_proj": self.n_kv_heads, "v_proj": self.n_kv_heads}
        return heads[projection] * self.head_dim if projection in heads else self.hidden_size


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """B-only LoRA on the attention of layers `first_layer` and above, A frozen and shared.

    One adapter is one vector of `size` numbers: for each adapted layer, for each of PROJECTIONS,
    B [out, rank] row by row. A comes from `seed` alone, so it is never stored with a library;
    averages of adapters are exact in ΔW, because ΔW = scale · B A is linear in B. An adapter that
    has learnt on its own may move A, too: its vector of `full_size` numbers goes on with what is
    added to each A [rank, in], in the same order.
    """

    shape: BaseShape
    first_layer: int
    rank: int
    alpha: float
    seed: int

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.shape.n_layers)

    @property
    def b_sizes(self) -> list[int]:
        """Numbers per B, in the order of the vector."""
        per_layer = [self.shape.out_features(p) * self.rank for p in PROJECTIONS]
        return per_layer * len(self.layers)

    @property
    def size(self) -> int:
        return sum(self.b_sizes)

    @property
    def a_sizes(self) -> list[int]:
        """Numbers per A, in the order of the vector."""
        per_layer = [self.rank * self.shape.in_features(p) for p in PROJECTIONS]
        return per_layer * len(self.layers)

    @property
    def full_size(self) -> int:
        return self.size + sum(self.a_sizes)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def frozen_a(self) -> Mapping[tuple[int, str], Tensor]:
        """(layer, projection) → float32 [rank, in], uniform as PEFT's own initialisation.

        Do not write to them.
        """
        return _frozen_a(self)

    def a_of(self, vector: Tensor) -> Mapping[tuple[int, str], Tensor]:
        """(layer, projection) → A [rank, in] of `vector` [size] or [full_size]."""
        frozen = self.frozen_a()
        if len(vector) == self.size:
            return frozen
        moved = torch.split(vector[self.size :], self.a_sizes)
        pairs = zip(frozen.items(), moved, strict=True)
        return {key: a + part.view(a.shape) for (key, a), part in pairs}

    def unflatten(self, vector: Tensor) -> dict[tuple[int, str], Tensor]:
        """(layer, projection) → B [out, rank], views of `vector` [size] or [full_size]."""
        parts = iter(torch.split(vector[: self.size], self.b_sizes))
        return {
            (layer, p): next(parts).view(self.shape.out_features(p), self.rank)
            for layer in self.layers
            for p in PROJECTIONS
        }

    def peft(self, vector: Tensor, base: str) -> tuple[dict[str, object], dict[str, Tensor]]:
        """A plain PEFT LoRA: `adapter_config.json` and the tensors of its safetensors file."""
        a, b = self.a_of(vector.float()), self.unflatten(vector.float())
        tensors: dict[str, Tensor] = {}
        for (layer, p), factor in b.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{p}"
            tensors[f"{stem}.lora_A.weight"] = a[layer, p]
            tensors[f"{stem}.lora_B.weight"] = factor.contiguous()
        config: dict[str, object] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": list(PROJECTIONS),
            "layers_to_transform": list(self.layers),
            "layers_pattern": "layers",
            "inference_mode": True,
        }
        return config, tensors

    def delta_norm(self, vector: Tensor) -> float:
        """‖ΔW‖ over all adapted projections (Frobenius)."""
        a, total = self.a_of(vector.float()), 0.0
        for key, b in self.unflatten(vector.float()).items():
            gram_a, gram_b = a[key] @ a[key].T, b.T @ b
            total += float((gram_a * gram_b).sum())
        return self.scale * math.sqrt(max(total, 0.0))

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> AdapterLayout:
        fields = dict(data)
        shape = fields.pop("shape")
        assert isinstance(shape, dict)
        return cls(shape=BaseShape(**shape), **fields)  # type: ignore[arg-type]


@lru_cache(maxsize=4)
def _frozen_a(layout: AdapterLayout) -> Mapping[tuple[int, str], Tensor]:
    with torch.inference_mode(False):  # whoever asks first
        generator = torch.Generator().manual_seed(layout.seed)
        factors: dict[tuple[int, str], Tensor] = {}
        for layer in layout.layers:
            for projection in PROJECTIONS:
                n_in = layout.shape.in_features(projection)
                a = torch.rand(layout.rank, n_in, generator=generator)
                factors[layer, projection] = (2 * a - 1) / math.sqrt(n_in)
    return factors
