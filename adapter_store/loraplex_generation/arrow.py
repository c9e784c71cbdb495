"""Arrow: every token picks its experts itself, in every projection, without any training.

v_e = top right singular vector of B_e A;  score = |x · v_e|;  top-k, softmax over them
delta = Σ_e w_e · s · B_e A x
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_adapter_store.selector import ARROW_TOP_K

from .layout import PROJECTIONS, AdapterLayout

__all__ = ["ArrowExperts"]


class ArrowExperts:
    """Adapters for a FrozenBase: the whole library at once, the same for every row."""

    def __init__(
        self, layout: AdapterLayout, experts: Tensor, dtype: torch.dtype, *, k: int = ARROW_TOP_K
    ) -> None:
        """`experts` [n_experts, layout.size]."""
        self.first_layer = layout.first_layer
        self._k, self._rank = min(k, len(experts)), layout.rank
        a = layout.frozen_a()
        parts = [layout.unflatten(expert.float()) for expert in experts]
        self._a: dict[tuple[int, str], Tensor] = {}
        self._b: dict[tuple[int, str], Tensor] = {}  # [n_experts · rank, out]
        self._prototypes: dict[tuple[int, str], Tensor] = {}  # [n_experts, in]
        for layer in layout.layers:
            for projection in PROJECTIONS:
                key = layer, projection
                b = torch.stack([part[key] for part in parts])  # [n_experts, out, rank]
                self._prototypes[key] = _top_right_vectors(b, a[key]).to(dtype)
                self._a[key] = (a[key] * layout.scale).to(dtype)
                self._b[key] = b.transpose(1, 2).reshape(-1, b.shape[1]).to(dtype)

    def qkv(self, x: Tensor, layer: int) -> Tensor:
        return torch.cat([self._delta(x, (layer, p)) for p in PROJECTIONS[:3]], -1)

    def o(self, x: Tensor, layer: int) -> Tensor:
        return self._delta(x, (layer, "o_proj"))

    def _delta(self, x: Tensor, key: tuple[int, str]) -> Tensor:
        score = (x @ self._prototypes[key].T).abs().float()
        top = score.topk(self._k, -1)
        weight = torch.zeros_like(score).scatter(-1, top.indices, top.values.softmax(-1))
        u = x @ self._a[key].T  # [..., rank], the same for all experts
        spread = (weight.to(x.dtype)[..., None] * u[..., None, :]).flatten(-2)
        return spread @ self._b[key]


def _top_right_vectors(b: Tensor, a: Tensor) -> Tensor:
    """[n_experts, in] for b [n_experts, out, rank], a [rank, in]; in the row space of A."""
    q, r = torch.linalg.qr(a.T)  # A = Rᵀ Qᵀ
    core = r @ (b.transpose(1, 2) @ b) @ r.T
    vectors: Tensor = torch.linalg.eigh(core).eigenvectors[..., -1] @ q.T
    return vectors
