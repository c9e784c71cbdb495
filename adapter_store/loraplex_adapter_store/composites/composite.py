"""Adapters that requests combine from several named adapters: mixtures and libraries (Arrow)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import InvalidSelector
from loraplex_adapter_store.names.selector import Library, Mixture, NameRef
from loraplex_adapter_store.plan import AdapterPlan, ExpertPlan, Family, ModulePlan, RoutingStrategy

from .mixture import mix_plans, mixture_digest, outline_mixture


@dataclass(frozen=True, slots=True)
class Composite:
    label: str  # the selector in words
    refs: tuple[NameRef, ...]
    identify: Callable[[Sequence[str]], str]  # digests of the parts → digest of the composite
    build: Callable[[Sequence[AdapterPlan], str], AdapterPlan]  # (parts, digest) → plan
    # (parts, digest) → shapes and bytes of the plan. None: the composite is as large as its parts.
    outline: Callable[[Sequence[AdapterPlan], str], AdapterPlan] | None = None

    @staticmethod
    def of_mixture(mixture: Mixture, base: BaseSpec) -> Composite:
        """Describe a mixture.

        Its ``build`` and ``outline`` raise InvalidSelector if a part is not additive.
        """
        weights = [part.weight for part in mixture.parts]
        names = [part.ref.name for part in mixture.parts]

        return Composite(
            str(mixture),
            tuple(part.ref for part in mixture.parts),
            lambda digests: mixture_digest(list(zip(digests, weights, strict=True))),
            lambda plans, digest: mix_plans(
                list(zip(plans, weights, strict=True)), base, digest, names
            ),
            lambda plans, digest: outline_mixture(plans, digest, names),
        )

    @staticmethod
    def of_library(library: Library, gate_of: GateOf | None) -> Composite:
        """Raises InvalidSelector if ``gate_of`` is None."""
        if gate_of is None:
            raise InvalidSelector("this store has no gates for libraries (arrow)")
        k, temperature = library.top_k, library.temperature
        names = [ref.name for ref in library.refs]
        return Composite(
            str(library),
            tuple(library.refs),
            lambda digests: library_digest(digests, k, temperature),
            lambda plans, digest: library_plan(plans, digest, k, temperature, gate_of, names),
        )


# (factors (b [out, rank], a [rank, in]) of each LoRA, temperature) → float32 [n_loras, in]
GateOf = Callable[[Sequence[tuple[Tensor, Tensor]], float], Tensor]


def library_digest(digests: Sequence[str], top_k: int, temperature: float) -> str:
    """Return the identity of a library, which does not depend on the order of its members."""
    text = "\n".join([*sorted(digests), str(top_k), repr(temperature)])
    return hashlib.sha256(f"loraplex-arrow-1\n{text}".encode()).hexdigest()


def library_plan(
    plans: Sequence[AdapterPlan],
    digest: str,
    top_k: int,
    temperature: float,
    gate_of: GateOf,
    names: Sequence[str],
) -> AdapterPlan:
    """Return the library's routed plan. ``names`` are for errors.

    Raises InvalidSelector if a member has parts other than low-rank factors.

    Members may target different modules. A member attracts no token at a projection that it does
    not adapt, and adds nothing there.
    """
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
    elif plan.invocation is not None:
        reason = "its invocation tokens activate it"
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
