"""LISA and full fine-tunes: ΔW = W_ft − W per tensor, served as truncated-SVD LoRA.

Lossy, and says so: the report states the kept share of Σ‖ΔW‖²; below ``min_delta_energy`` the
adapter is refused. Biases, norms and (when few rows changed) embedding rows are kept exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.plan import Family, ModulePlan, NormPlan

from .contract import Fold, ReadContext

__all__ = ["read", "truncate"]

_ENOUGH = 1 - 1e-9  # share of ‖ΔW‖² at which more rank adds nothing float32 can hold
_MAX_ROWS = 4096  # changed embedding rows kept as rows


@dataclass(slots=True)
class _Parts:
    modules: dict[str, ModulePlan] = field(default_factory=dict)
    rows: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    norms: dict[str, NormPlan] = field(default_factory=dict)
    kept: float = 0.0
    total: float = 0.0
    worst: tuple[float, str] = (1.0, "")


def read(context: ReadContext) -> Fold:
    parts = _Parts()
    for key in context.ledger.names:
        name = _parameter_name(key, context.base.parameters)
        if name is not None:
            _read_parameter(context, parts, key, name)
    _tie(context, parts)
    if context.ledger.unclaimed == context.ledger.names:
        raise AdapterMismatch(
            "no tensor matches a parameter of the base",
            context.ledger.names,
            unexpected_keys=context.ledger.names,
        )
    energy, max_rank = parts.kept / parts.total if parts.total else 1.0, _max_rank(context)
    if energy < context.limits.min_delta_energy:
        raise UnsupportedAdapter(
            f"rank {max_rank} keeps {energy:.1%} of the change, this server "
            f"asks for {context.limits.min_delta_energy:.1%} (worst: {parts.worst[1]}, "
            f"{parts.worst[0]:.1%}); serve it as a base model, or raise max_delta_rank"
        )
    context.notes.append(f"truncated SVD keeps {energy:.6f} of ‖ΔW‖² (worst {parts.worst[1]})")
    return Fold(
        family=Family.FULL,
        scale_rule=f"SVD to rank ≤ {max_rank}, kept energy {energy:.6f}",
        modules=parts.modules,
        embedding_rows=parts.rows.get(context.base.input_embedding, {}),
        head_rows=parts.rows.get(context.base.output_head, {}),
        norms=parts.norms,
        kept_energy=energy,
    )


def truncate(delta: Tensor, max_rank: int) -> tuple[Tensor, Tensor, float]:
    """(A [k, in], B [out, k], kept ‖·‖²) of the best rank-k approximation, k ≤ ``max_rank``.

    Through the Gram matrix of the shorter side in float64: exact to the projection, no full SVD.
    """
    wide = delta.shape[0] <= delta.shape[1]
    short = (delta if wide else delta.t()).double()  # [m, n], m ≤ n
    energies, vectors = torch.linalg.eigh(short @ short.t())
    energies, vectors = energies.flip(0).clamp_min(0), vectors.flip(1)
    share = energies.cumsum(0) / energies.sum().clamp_min(torch.finfo(torch.float64).tiny)
    k = min(max_rank, int((share < _ENOUGH).sum()) + 1, int((energies > 0).sum()))
    basis = vectors[:, :k]
    rest = basis.t() @ short  # [k, n]
    kept = float(energies[:k].sum())
    left, right = (basis, rest) if wide else (rest.t(), basis.t())
    return right.float().contiguous(), left.float().contiguous(), kept


def _max_rank(context: ReadContext) -> int:
    return min(context.limits.max_delta_rank, context.limits.max_rank)


def _parameter_name(key: str, parameters: Iterable[str]) -> str | None:
    known = frozenset(parameters)
    for candidate in (key, f"model.{key}", key.removeprefix("model."), key.removeprefix("module.")):
        if candidate in known:
            return candidate
    return None


def _read_parameter(context: ReadContext, parts: _Parts, key: str, name: str) -> None:
    base = context.base
    value = context.ledger.take(key, base.parameters[name])
    delta = value - base.parameter(name)
    if not bool(delta.any()):
        return
    module, _, leaf = name.rpartition(".")
    if module in base.conv1d and leaf == "weight":
        delta = delta.t()
    if leaf == "bias" and module in base.modules:
        old = parts.modules.get(module, ModulePlan())
        parts.modules[module] = ModulePlan(a=old.a, b=old.b, bias=delta)
    elif leaf == "weight" and (module in base.embeddings or module == base.output_head):
        _read_rows(context, parts, module, value, delta)
    elif leaf == "weight" and module in base.modules:
        _read_linear(context, parts, module, delta)
    elif leaf in ("weight", "bias") and module not in base.embeddings:
        norm = parts.norms.get(module, NormPlan())
        parts.norms[module] = (
            replace(norm, weight=value) if leaf == "weight" else replace(norm, bias=value)
        )
    else:
        raise UnsupportedAdapter(f"{name} of the base was trained; only weights and biases serve")


def _read_linear(context: ReadContext, parts: _Parts, module: str, delta: Tensor) -> None:
    a, b, kept = truncate(delta, _max_rank(context))
    total = float(delta.double().square().sum())
    parts.kept += min(kept, total)
    parts.total += total
    parts.worst = min(parts.worst, (kept / total, module))
    old = parts.modules.get(module, ModulePlan())
    parts.modules[module] = ModulePlan(a=a, b=b, bias=old.bias)


def _read_rows(
    context: ReadContext, parts: _Parts, module: str, value: Tensor, delta: Tensor
) -> None:
    changed = delta.ne(0).any(dim=1).nonzero().flatten().tolist()
    if len(changed) <= _MAX_ROWS:
        parts.rows[module] = {index: value[index].clone() for index in changed}
    elif module == context.base.output_head:
        _read_linear(context, parts, module, delta)
    else:
        _read_linear(context, parts, module, delta.t())  # one-hot input: [width, n_rows]


def _tie(context: ReadContext, parts: _Parts) -> None:
    """A tied head moves with the embedding unless the checkpoint carries its own."""
    base = context.base
    embedding, head = base.input_embedding, base.output_head
    if not base.tie_word_embeddings:
        return
    if embedding in parts.rows and head not in parts.rows:
        parts.rows[head] = dict(parts.rows[embedding])
    plan = parts.modules.get(embedding)
    if plan is not None and plan.a is not None and plan.b is not None and head not in parts.modules:
        parts.modules[head] = ModulePlan(a=plan.b.t().contiguous(), b=plan.a.t().contiguous())
