"""A library of plain LoRAs behind one gate without training (Arrow), as one routed plan.

Each projection gets the LoRAs as its experts; which of them a token uses is decided by a gate that
is computed from the factors. How it is computed is the caller's business (``GateOf``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

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
    plans: Sequence[AdapterPlan], digest: str, top_k: int, temperature: float, gate_of: GateOf
) -> AdapterPlan:
    """Raises InvalidSelector if a member is more than low-rank factors, or sits elsewhere."""
    members = sorted(plans, key=lambda plan: plan.digest)
    targets = set(members[0].modules)
    for plan in members:
        _check_plain(plan)
        if set(plan.modules) != targets:
            differing = sorted(targets ^ set(plan.modules))[0]
            raise InvalidSelector(
                f"arrow needs adapters on the same modules; {plan.digest[:12]} and "
                f"{members[0].digest[:12]} differ at {differing}"
            )
    experts = {}
    for name in sorted(targets):
        modules = [plan.modules[name] for plan in members]
        experts[name] = ExpertPlan(
            gate=gate_of([_factors(module) for module in modules], temperature),
            strategy=RoutingStrategy.ARROW,
            top_k=min(top_k, len(members)),
            top_p=0.0,
            experts=tuple({name: module} for module in modules),
        )
    templates = {plan.chat_template for plan in members}
    n_bytes = sum(block.gate.nbytes for block in experts.values())
    return AdapterPlan(
        digest=digest,
        family=Family.LORA,
        modules={},
        experts=experts,
        chat_template=templates.pop() if len(templates) == 1 else None,
        n_bytes=n_bytes + sum(plan.n_bytes for plan in members),
    )


def _check_plain(plan: AdapterPlan) -> None:
    reason = ""
    if plan.experts or plan.prefix is not None or plan.dense:
        reason = "it is more than low-rank factors"
    elif plan.embedding_rows or plan.head_rows:
        reason = "it replaces rows of embeddings"
    for name, module in plan.modules.items():
        beyond = (module.out_scale, module.bias, module.in_scale, module.shared)
        if module.a is None or any(part is not None for part in beyond):
            reason = f"{name} is more than low-rank factors"
    if reason:
        raise InvalidSelector(
            f"adapter {plan.digest[:12]} ({plan.family.value}) cannot stand in a library: {reason}"
        )


def _factors(module: ModulePlan) -> tuple[Tensor, Tensor]:
    assert module.a is not None  # checked
    assert module.b is not None
    return module.b, module.a
