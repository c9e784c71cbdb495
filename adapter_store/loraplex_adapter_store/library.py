"""A library of plain LoRAs behind one gate without training (Arrow), as one routed plan.

Each projection gets the LoRAs as its experts; which of them a token uses is decided by a gate that
is computed from the factors. How it is computed is the caller's business (``GateOf``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from .errors import InvalidSelector
from .plan import AdapterPlan, ExpertPlan, Family, ModulePlan, RoutingStrategy

__all__ = ["GateOf", "library_digest", "library_plan"]

# (factors (b [out, rank], a [rank, in]) of each LoRA, temperature) → float32 [n_loras, in]
GateOf = Callable[[Sequence[tuple[Tensor, Tensor]], float], Tensor]


def library_digest(digests: Sequence[str], top_k: int, temperature: float) -> str:
    """Identity of a library; the order of its members does not matter."""
    text = "\n".join([*sorted(digests), str(top_k), repr(temperature)])
    return hashlib.sha256(f"loraplex-arrow-1\n{text}".encode()).hexdigest()


def library_plan(
    plans: Sequence[AdapterPlan],
    digest: str,
    top_k: int,
    temperature: float,
    gate_of: GateOf,
    *,
    names: Sequence[str] = (),
) -> AdapterPlan:
    """Raises InvalidSelector if a member is more than low-rank factors.

    ``names``: of the members, for errors.

    Members may target different modules: one that does not touch a projection attracts no token
    there, and adds nothing where it is chosen all the same.
    """
    names = names or [plan.digest[:12] for plan in plans]
    for plan, name in zip(plans, names, strict=True):
        _check_plain(plan, name)
    members = sorted(plans, key=lambda plan: plan.digest)
    experts = {}
    for name in sorted({name for plan in members for name in plan.modules}):
        modules = [plan.modules.get(name) for plan in members]
        width = next(int(m.a.shape[1]) for m in modules if m is not None and m.a is not None)
        experts[name] = ExpertPlan(
            gate=gate_of([_factors(module, width) for module in modules], temperature),
            strategy=RoutingStrategy.ARROW,
            top_k=min(top_k, len(members)),
            top_p=0.0,
            experts=tuple({} if module is None else {name: module} for module in modules),
        )
    templates = {plan.chat_template for plan in members}
    poolings = {plan.pooling for plan in members}
    n_bytes = sum(block.gate.nbytes for block in experts.values())
    return AdapterPlan(
        digest=digest,
        family=Family.LORA,
        modules={},
        experts=experts,
        chat_template=templates.pop() if len(templates) == 1 else None,
        pooling=poolings.pop() if len(poolings) == 1 else None,
        n_bytes=n_bytes + sum(plan.n_bytes for plan in members),
    )


def _check_plain(plan: AdapterPlan, name: str) -> None:
    reason = ""
    beyond = (plan.experts, plan.replaced_weights, plan.norms, plan.stacked)
    if plan.head is not None:
        reason = "it is a classifier"
    elif plan.prefix is not None or any(beyond):
        reason = "it is more than low-rank factors"
    elif plan.embedding_rows or plan.head_rows:
        reason = "it replaces rows of embeddings"
    for path, module in plan.modules.items():
        beside = [f.name for f in fields(module) if f.name not in ("a", "b")]
        if module.a is None or any(getattr(module, part) is not None for part in beside):
            reason = f"{path} is more than low-rank factors"
    if reason:
        raise InvalidSelector(
            f"adapter {name!r} ({plan.family.value}) cannot stand in a library: {reason}"
        )


def _factors(module: ModulePlan | None, width: int) -> tuple[Tensor, Tensor]:
    if module is None or module.a is None or module.b is None:
        return torch.zeros(1, 1), torch.zeros(1, width)
    return module.b, module.a
