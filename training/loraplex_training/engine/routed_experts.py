"""Routed LoRA experts on the MLPs of a frozen base, for the segments that have them.

    p = softmax(W_r h);  w_e = p_e / Σ_{j∈top-k} p_j
    y = W_down Σ_e w_e a_e + s Σ_e w_e B_down^e A_down^e a_e,
    a_e = act(W_gate h + s B_gate^e A_gate^e h) ⊙ (W_up h + s B_up^e A_up^e h)

The base's products are computed once for all rows. Other segments have the base's MLP.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot

from .segmented_lora import Dropout

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Experts(NamedTuple):
    """The experts of an adapter on one MLP, float32."""

    router: Tensor  # [n, hidden]
    factors: Mapping[str, tuple[Tensor, Tensor]]  # projection → A [n, r, in], B [n, out, r]
    scale: float
    top_k: int


class RoutedRows(NamedTuple):
    """The rows [first, end) of a batch that an adapter's experts compute."""

    first: int
    end: int
    experts: Experts
    dropout: Dropout | None


class RoutedMlp(nn.Module):
    """Stands in the model for an MLP of the Llama layout. ``routed`` is that of the batch."""

    def __init__(self, name: str, base: nn.Module) -> None:
        super().__init__()
        self._name, self._base = name, base
        self.routed: list[RoutedRows] = []
        self.logits: dict[int, Tensor] = {}  # first row → float32 [rows, n], of the last forward

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return True for an MLP down(act(gate(x)) ⊙ up(x))."""
        return all(isinstance(getattr(module, name, None), nn.Module) for name in PROJECTIONS) and (
            hasattr(module, "act_fn")
            and {name for name, _ in module.named_children()} <= {*PROJECTIONS, "act_fn"}
        )

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.routed:
            plain: Tensor = self._base(hidden)
            return plain
        base: Any = self._base
        h = hidden.reshape(-1, hidden.shape[-1])
        gate, up = (proj(hidden).view(len(h), -1) for proj in (base.gate_proj, base.up_proj))
        self.logits = {}
        acts, outs, done = [], [], 0
        for rows in self.routed:
            acts.append(base.act_fn(gate[done : rows.first]) * up[done : rows.first])
            outs.append(h.new_zeros(rows.first - done, h.shape[1]))
            at = slice(rows.first, rows.end)
            mixed, out = self._routed(rows, h[at], gate[at], up[at])
            acts.append(mixed)
            outs.append(out)
            done = rows.end
        acts.append(base.act_fn(gate[done:]) * up[done:])
        outs.append(h.new_zeros(len(h) - done, h.shape[1]))
        down: Tensor = base.down_proj(torch.cat(acts).view(*hidden.shape[:-1], -1))
        return down + torch.cat(outs).view_as(hidden)

    def _routed(
        self, rows: RoutedRows, h: Tensor, gate: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the mixed activations [rows, ff], and the experts' part of the output."""
        experts = rows.experts
        logits = h.float() @ experts.router.t()  # in bfloat16 other experts would be chosen
        self.logits[rows.first] = logits
        top = logits.topk(experts.top_k, dim=-1)
        weight = torch.softmax(top.values, dim=-1).to(h.dtype)[:, :, None]  # [rows, k, 1]
        chosen = one_hot(top.indices, logits.shape[1]).to(h.dtype)[..., None]  # [rows, k, n, 1]
        g = gate[:, None] + self._expand(
            rows, "gate_proj", self._shrink(rows, "gate_proj", h), chosen
        )
        u = up[:, None] + self._expand(rows, "up_proj", self._shrink(rows, "up_proj", h), chosen)
        base: Any = self._base
        act = base.act_fn(g) * u  # [rows, k, ff]
        inner = self._shrink(rows, "down_proj", act)
        out = self._expand(rows, "down_proj", inner, weight[..., None] * chosen)
        return (weight * act).sum(1), out.sum(1)

    def _shrink(self, rows: RoutedRows, projection: str, x: Tensor) -> Tensor:
        """Map [rows, …, in] to [rows, k or 1, n, r]."""
        a, _ = rows.experts.factors[projection]
        if rows.dropout is not None:
            x = x * rows.dropout.mask(f"{self._name}.{projection}", x)
        z = linear(x, a.flatten(0, 1).to(x.dtype))
        return z.view(len(x), -1, *a.shape[:2])

    @staticmethod
    def _expand(rows: RoutedRows, projection: str, z: Tensor, chosen: Tensor) -> Tensor:
        """Map [rows, k or 1, n, r] to [rows, k, out], from the chosen experts alone."""
        _, b = rows.experts.factors[projection]
        scaled = (b * rows.experts.scale).transpose(1, 2).flatten(0, 1).to(z.dtype)  # [n · r, out]
        return (z * chosen).flatten(-2) @ scaled
