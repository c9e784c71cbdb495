"""LISA and full fine-tunes: ΔW = W_ft − W per tensor, served as a LoRA by truncated SVD.

This is lossy: the report states the kept share of Σ‖ΔW‖². Below ``min_delta_energy`` the adapter is
refused, once the weights that were compressed have lost too much: a fine-tune without low-rank
structure costs little more than reading it. Biases, norms and, if few rows changed, embedding rows
are exact.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.families.contract import Fold, ReadContext
from loraplex_adapter_store.plan import AdapterPlan, Family, ModulePlan, NormPlan

_ENOUGH = 1 - 1e-9  # share of ‖ΔW‖² beyond which more rank is below float32's precision
_MAX_ROWS = 4096  # changed embedding rows kept as rows
_MAX_EXACT = 256  # rows of the largest matrix whose eigenvectors are computed
_N_SPARE = 16  # dimensions of a random subspace beyond the rank
_N_ITERATIONS = 3  # of a random subspace


class _Weight(NamedTuple):
    """A changed weight that is served as a LoRA."""

    module: str
    energy: float  # ‖ΔW‖²
    load: Callable[[], Tensor]  # returns ΔW [out, in]


@dataclass(slots=True)
class _Parts:
    weights: list[_Weight] = field(default_factory=list)
    modules: dict[str, ModulePlan] = field(default_factory=dict)
    rows: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    norms: dict[str, NormPlan] = field(default_factory=dict)


def read(context: ReadContext) -> Fold:
    parts = _Parts()
    for key in context.ledger.names:
        name = _parameter_name(key, context.base.parameters)
        if name is not None:
            _read_parameter(context, parts, key, name)
    if context.ledger.unclaimed == context.ledger.names:
        raise AdapterMismatch(
            "no tensor matches a parameter of the base",
            context.ledger.names,
            unexpected_keys=context.ledger.names,
        )
    energy = _compress(context, parts)
    _tie(context, parts)
    plan = AdapterPlan(
        digest="",
        family=Family.FULL,
        modules=parts.modules,
        embedding_rows=parts.rows.get(context.base.input_embedding, {}),
        head_rows=parts.rows.get(context.base.output_head, {}),
        norms=parts.norms,
    )
    return Fold(plan, f"SVD to rank ≤ {_max_rank(context)}, kept energy {energy:.6f}", energy)


def truncate(delta: Tensor, max_rank: int) -> tuple[Tensor, Tensor, float]:
    """Return (A [k, in], B [out, k], kept ‖·‖²) of the best rank-k approximation, k ≤ ``max_rank``.

    Computed from the Gram matrix of the shorter side in float64, without a full SVD. A matrix with
    two long sides is projected to a random subspace first, which loses next to nothing of what has
    low-rank structure (Halko, Martinsson, Tropp 2011).
    """
    wide = delta.shape[0] <= delta.shape[1]
    short = delta if wide else delta.t()  # [m, n], m ≤ n
    if short.shape[0] > max(_MAX_EXACT, 2 * (max_rank + _N_SPARE)):
        basis = _range_of(short, max_rank + _N_SPARE)
        a, b, kept_energy = truncate(basis.t() @ short, max_rank)
        left, right = (basis @ b, a) if wide else (a.t(), (basis @ b).t())
        return right.contiguous(), left.contiguous(), kept_energy
    short = short.double()
    energies, vectors = torch.linalg.eigh(short @ short.t())
    energies, vectors = energies.flip(0).clamp_min(0), vectors.flip(1)
    share = energies.cumsum(0) / energies.sum().clamp_min(torch.finfo(torch.float64).tiny)
    k = min(max_rank, int((share < _ENOUGH).sum()) + 1, int((energies > 0).sum()))
    basis = vectors[:, :k]
    rest = basis.t() @ short  # [k, n]
    kept_energy = float(energies[:k].sum())
    left, right = (basis, rest) if wide else (rest.t(), basis.t())
    return right.float().contiguous(), left.float().contiguous(), kept_energy


def _range_of(matrix: Tensor, width: int) -> Tensor:
    """Return orthonormal columns [m, width] that span nearly what the matrix [m, n] maps to."""
    random = torch.Generator().manual_seed(0)  # equal files give equal plans
    found = matrix @ torch.randn(matrix.shape[1], width, generator=random)
    for _ in range(_N_ITERATIONS):
        found = matrix @ (matrix.t() @ torch.linalg.qr(found)[0])
    basis: Tensor = torch.linalg.qr(found)[0]
    return basis


def _compress(context: ReadContext, parts: _Parts) -> float:
    """Compress the weights, most changed first, and return the kept share of ‖ΔW‖².

    Raises UnsupportedAdapter as soon as the lost share is too large.
    """
    max_rank, least = _max_rank(context), context.limits.min_delta_energy
    total = sum(weight.energy for weight in parts.weights)
    lost, worst = 0.0, (1.0, "")
    for module, energy, load in sorted(parts.weights, key=lambda weight: -weight.energy):
        a, b, kept = truncate(load(), max_rank)
        lost += max(0.0, energy - kept)
        worst = min(worst, (kept / energy, module))
        if lost > (1 - least) * total:
            raise UnsupportedAdapter(
                f"rank {max_rank} keeps at most {1 - lost / total:.1%} of the change, this server "
                f"asks for {least:.1%} (worst: {worst[1]}, {worst[0]:.1%}); serve it as a base "
                "model, or raise max_delta_rank"
            )
        old = parts.modules.get(module, ModulePlan())
        parts.modules[module] = ModulePlan(a=a, b=b, bias=old.bias)
    kept_share = 1 - lost / total if total else 1.0
    context.notes.append(f"truncated SVD keeps {kept_share:.6f} of ‖ΔW‖² (worst {worst[1]})")
    return kept_share


def _max_rank(context: ReadContext) -> int:
    return min(context.limits.max_delta_rank, context.limits.max_rank)


def _parameter_name(key: str, parameters: Container[str]) -> str | None:
    spellings = (key, f"model.{key}", key.removeprefix("model."), key.removeprefix("module."))
    return next((name for name in spellings if name in parameters), None)


def _read_parameter(context: ReadContext, parts: _Parts, key: str, name: str) -> None:
    base = context.base
    value, delta = _value_and_delta(context, key, name)
    if not bool(delta.any()):
        return
    module, _, leaf = name.rpartition(".")
    load = partial(_delta, context, key, name)
    if leaf == "bias" and module in base.modules:
        old = parts.modules.get(module, ModulePlan())
        parts.modules[module] = ModulePlan(a=old.a, b=old.b, bias=delta)
    elif leaf == "weight" and (module in base.embeddings or module == base.output_head):
        changed = delta.ne(0).any(dim=1).nonzero().flatten().tolist()
        if len(changed) <= _MAX_ROWS:
            parts.rows[module] = {index: value[index].clone() for index in changed}
        else:
            parts.weights.append(_Weight(module, _energy(delta), load))
    elif leaf == "weight" and module in base.modules:
        parts.weights.append(_Weight(module, _energy(delta), load))
    elif leaf in ("weight", "bias") and module not in base.embeddings:
        parts.norms[module] = replace(parts.norms.get(module, NormPlan()), **{leaf: value})
    else:
        raise UnsupportedAdapter(f"{name} of the base was trained; only weights and biases serve")


def _value_and_delta(context: ReadContext, key: str, name: str) -> tuple[Tensor, Tensor]:
    value = context.ledger.take(key, context.base.parameters[name])
    return value, value - context.base.parameter(name)


def _delta(context: ReadContext, key: str, name: str) -> Tensor:
    """Return ΔW as a linear has it: [out, in]. An embedding's input is one-hot."""
    _, delta = _value_and_delta(context, key, name)
    module, base = name.rpartition(".")[0], context.base
    is_embedding = module in base.embeddings and module != base.output_head
    return delta.t() if module in base.conv1d or is_embedding else delta


def _energy(delta: Tensor) -> float:
    return float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2


def _tie(context: ReadContext, parts: _Parts) -> None:
    """Change a tied head with the embedding, unless the checkpoint has a head of its own."""
    base = context.base
    embedding, head = base.input_embedding, base.output_head
    if not base.tie_word_embeddings:
        return
    if embedding in parts.rows and head not in parts.rows:
        parts.rows[head] = dict(parts.rows[embedding])
    plan = parts.modules.get(embedding)
    if plan is not None and plan.a is not None and plan.b is not None and head not in parts.modules:
        parts.modules[head] = ModulePlan(a=plan.b.t().contiguous(), b=plan.a.t().contiguous())
