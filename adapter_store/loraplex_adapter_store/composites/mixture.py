"""Weighted mixtures: W + Σ wᵢ ΔWᵢ, exactly, as one plan with the ranks concatenated.

Additive parts mix exactly: factors, deltas, biases, and trained rows, weights and norms as
differences from the base. Other parts (DoRA, IA³, rotations, experts, prefixes) are refused.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import InvalidSelector
from loraplex_adapter_store.operators.contract import Delta
from loraplex_adapter_store.operators.kinds import SumDelta
from loraplex_adapter_store.plan import AdapterPlan, Family, ModulePlan, NormPlan

_DESCRIPTION = frozenset(
    {"digest", "family", "chat_template", "n_bytes", "packed_adapter", "pooling"}
)
_ADDITIVE = _DESCRIPTION | {"modules", "embedding_rows", "head_rows", "replaced_weights", "norms"}
_ADDITIVE_IN_MODULES = frozenset({"a", "b", "bias", "shared", "delta_operator"})


def mixture_digest(parts: Sequence[tuple[str, float]]) -> str:
    """Return the identity of a mixture of (digest, weight), the same for every order of parts."""
    text = "\n".join(f"{digest} {weight!r}" for digest, weight in sorted(parts))
    return hashlib.sha256(f"loraplex-mixture-1\n{text}".encode()).hexdigest()


def mix_plans(
    parts: Sequence[tuple[AdapterPlan, float]],
    base: BaseSpec,
    digest: str,
    names: Sequence[str],
) -> AdapterPlan:
    """Raises InvalidSelector if a part is not additive. ``names`` of the parts are for errors."""
    for (plan, _), name in zip(parts, names, strict=True):
        _check_additive(plan, name)
    paths = dict.fromkeys(path for plan, _ in parts for path in plan.modules)
    modules = {
        path: _mix_module([(plan.modules[path], w) for plan, w in parts if path in plan.modules])
        for path in paths
    }
    dense = _mix_dense(parts, base)
    embedding, head = (
        {} if module in dense else _mix_rows(parts, base, module)
        for module in (base.input_embedding, base.output_head)
    )
    norms = _mix_norms([(plan.norms, w) for plan, w in parts], base)
    templates = {plan.chat_template for plan, _ in parts}
    poolings = {plan.pooling for plan, _ in parts}
    mixed = AdapterPlan(
        digest=digest,
        family=Family.LORA,
        modules=modules,
        embedding_rows=embedding,
        head_rows=head,
        replaced_weights=dense,
        norms=norms,
        chat_template=templates.pop() if len(templates) == 1 else None,
        pooling=poolings.pop() if len(poolings) == 1 else None,
    )
    return replace(mixed, n_bytes=sum(tensor.nbytes for tensor in mixed.tensors()))


def outline_mixture(plans: Sequence[AdapterPlan], digest: str, names: Sequence[str]) -> AdapterPlan:
    """Return the factors of a mixture on the meta device, with an upper bound of its bytes.

    Shared bases become factors of each module, so a mixture may be far larger than its parts.
    Reads names and shapes only. Raises InvalidSelector as ``mix_plans`` does.
    """
    for plan, name in zip(plans, names, strict=True):
        _check_additive(plan, name)
    paths = dict.fromkeys(path for plan in plans for path in plan.modules)
    modules = {
        path: _outline_module([plan.modules[path] for plan in plans if path in plan.modules])
        for path in paths
    }
    n_bytes = sum(tensor.nbytes for module in modules.values() for tensor in module.tensors())
    for plan in plans:
        bare = {path: replace(m, a=None, b=None, shared=None) for path, m in plan.modules.items()}
        n_bytes += sum(tensor.nbytes for tensor in replace(plan, modules=bare).tensors())
    return AdapterPlan(digest=digest, family=Family.LORA, modules=modules, n_bytes=n_bytes)


def _check_additive(plan: AdapterPlan, name: str) -> None:
    others = list(_set_fields(plan, _ADDITIVE))
    for path, module in plan.modules.items():
        others += [f"{part} of {path}" for part in _set_fields(module, _ADDITIVE_IN_MODULES)]
    if others:
        more = f" and {len(others) - 1} more parts" if len(others) > 1 else ""
        raise InvalidSelector(
            f"adapter {name!r} ({plan.family.value}) cannot be mixed: its {others[0]}{more} "
            "cannot be added up; ask for it alone"
        )


def _set_fields(value: object, but: frozenset[str]) -> Iterator[str]:
    for spec in fields(value):  # type: ignore[arg-type]
        part = getattr(value, spec.name)
        if spec.name not in but and part is not None and part != {}:
            yield spec.name


def _mix_module(parts: Sequence[tuple[ModulePlan, float]]) -> ModulePlan:
    a: list[Tensor] = []
    b: list[Tensor] = []
    bias: Tensor | None = None
    deltas: list[Delta] = []
    for plan, weight in parts:
        if plan.delta_operator is not None:
            deltas.append(plan.delta_operator.scaled(weight))
        if plan.a is not None and plan.b is not None:
            a.append(plan.a)
            b.append(plan.b * weight)
        if plan.shared is not None:
            shared_a, shared_b = plan.shared.factors()
            a.append(shared_a)
            b.append(shared_b * weight)
        if plan.bias is not None:
            scaled = plan.bias * weight
            bias = scaled if bias is None else bias + scaled
    delta = deltas[0] if len(deltas) == 1 else SumDelta(tuple(deltas)) if deltas else None
    if not a:
        return ModulePlan(bias=bias, delta_operator=delta)
    return ModulePlan(a=torch.cat(a), b=torch.cat(b, dim=1), bias=bias, delta_operator=delta)


def _outline_module(plans: Sequence[ModulePlan]) -> ModulePlan:
    rank, sizes = 0, None
    for plan in plans:
        if plan.a is not None and plan.b is not None:
            rank += plan.rank
            sizes = plan.a.shape[1], plan.b.shape[0]
        if plan.shared is not None:
            rank += plan.shared.rank
            sizes = plan.shared.in_features, plan.shared.out_features
    if sizes is None:
        return ModulePlan()
    n_in, n_out = sizes
    a, b = (
        torch.empty(shape, dtype=torch.float32, device="meta")
        for shape in ((rank, n_in), (n_out, rank))
    )
    return ModulePlan(a=a, b=b)


def _mix_rows(
    parts: Sequence[tuple[AdapterPlan, float]], base: BaseSpec, module: str
) -> dict[int, Tensor]:
    tables = [(_rows_of(plan, module, base), weight) for plan, weight in parts]
    ids = dict.fromkeys(index for rows, _ in tables for index in rows)
    if not ids:
        return {}
    original = base.weight(module)
    mixed = {index: original[index].clone() for index in ids}
    for rows, weight in tables:
        for index, row in rows.items():
            mixed[index] += weight * (row - original[index])
    return mixed


def _rows_of(plan: AdapterPlan, module: str, base: BaseSpec) -> Mapping[int, Tensor]:
    if module == base.input_embedding:
        return plan.embedding_rows
    return plan.head_rows if module == base.output_head else {}


def _mix_dense(parts: Sequence[tuple[AdapterPlan, float]], base: BaseSpec) -> dict[str, Tensor]:
    """Mix replaced weights, with the trained rows of each replaced table."""
    mixed: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for plan, _ in parts for name in plan.replaced_weights):
        original = base.weight(name)
        total = original.clone()
        for plan, weight in parts:
            own = plan.replaced_weights.get(name, original)
            if own is not original:
                total += weight * (own - original)
            for index, row in _rows_of(plan, name, base).items():
                total[index] += weight * (row - own[index])
        mixed[name] = total
    return mixed


def _mix_norms(
    parts: Sequence[tuple[Mapping[str, NormPlan], float]], base: BaseSpec
) -> dict[str, NormPlan]:
    mixed: dict[str, NormPlan] = {}
    for name in dict.fromkeys(name for norms, _ in parts for name in norms):
        plans = [(norms[name], weight) for norms, weight in parts if name in norms]
        mixed[name] = NormPlan(
            weight=_mix_parameter([(n.weight, w) for n, w in plans], base, f"{name}.weight"),
            bias=_mix_parameter([(n.bias, w) for n, w in plans], base, f"{name}.bias"),
        )
    return mixed


def _mix_parameter(
    parts: Sequence[tuple[Tensor | None, float]], base: BaseSpec, name: str
) -> Tensor | None:
    values = [(value, weight) for value, weight in parts if value is not None]
    if not values:
        return None
    original = base.parameter(name)
    total = original.clone()
    for value, weight in values:
        total += weight * (value - original)
    return total
