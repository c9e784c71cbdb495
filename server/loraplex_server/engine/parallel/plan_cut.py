"""Cuts adapters into one part for each rank.

If W is cut by outputs (q, k, v, gate, up), A is whole and B, scales and biases are cut as W. If W
is cut by inputs (o, down), A is cut and B is whole:

    scale ⊙ (W x + B A x) + bias = Σ_ranks scale ⊙ (W_r x_r + B A_r x_r)   + bias, on rank 0

So an adapter adds no communication between the ranks. Operators on whole inputs and on summed
outputs need no cut, nor do deltas (see ``model.layers.cut_delta``). Gates, norms and the parts of
rank 0 alone (embedding, head, pooling) are whole.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from loraplex_adapter_store.operators.contract import Delta
from loraplex_adapter_store.operators.kinds import MaskedWeight, SumDelta, operator_name
from loraplex_adapter_store.plan import AdapterPlan, ExpertPlan, ModulePlan
from loraplex_server.model.layers.tensor_parallel import ShardLayout


def uncut_parts(plan: AdapterPlan, layout: ShardLayout) -> Iterator[str]:
    """Yield the parts of ``plan`` that cannot be cut, and a remedy. Looks at names only."""
    problems = []
    for name, module in plan.modules.items():
        if layout.is_cut(name):
            whole = module.input_operator if layout.is_summed(name) else module.output_operator
            problems += [] if whole is None else [f"{name}: {operator_name(whole)}"]
    problems += [
        f"{name}: experts of a linear whose inputs are cut"
        for name in plan.experts
        if layout.is_summed(name)
    ]
    yield from problems
    if problems:
        yield (
            f"these parts cannot be cut over {layout.size} processes; serve the adapter without "
            "--tensor-parallel-size"
        )


def without_shared_bases(plan: AdapterPlan) -> AdapterPlan:
    """Return the plan with VeRA's and RandLoRA's shared bases as ordinary factors."""
    return replace(plan, modules={name: _unrolled(m) for name, m in plan.modules.items()})


def cut_plan(plan: AdapterPlan, layout: ShardLayout, rank: int) -> AdapterPlan:
    """Return views of ``rank``'s part. Ranks other than 0 get only tensors of layers."""
    cut = replace(
        plan,
        modules={
            name: cut_module(name, module, layout, rank)
            for name, module in plan.modules.items()
            if rank == 0 or (layout.is_cut(name) and _has_parts(name, module, layout))
        },
        experts={
            name: _cut_experts(experts, layout, rank) for name, experts in plan.experts.items()
        },
        replaced_weights=_cut_weights(plan.replaced_weights, layout, rank),
    )
    if rank == 0:
        return cut
    return replace(
        cut,
        prefix=None,
        embedding_rows={},
        head_rows={},
        head=None,
        pooling=None,
        chat_template=None,
    )


def cut_module(name: str, module: ModulePlan, layout: ShardLayout, rank: int) -> ModulePlan:
    """Return ``rank``'s part of one linear."""
    if not layout.is_cut(name):
        return module
    module = _unrolled(module)
    outputs = layout.outputs(name, rank) or slice(None)
    inputs = layout.inputs(name, rank) or slice(None)
    return replace(
        module,
        a=_at(module.a, (slice(None), inputs)),
        b=_at(module.b, (outputs,)),
        in_scale=_at(module.in_scale, (inputs,)),
        out_scale=_at(module.out_scale, (outputs,)),
        bias=layout.cut_bias(name, module.bias, rank),
        delta_operator=_cut_delta(module.delta_operator, inputs, outputs),
    )


def _cut_delta(delta: Delta | None, inputs: slice, outputs: slice) -> Delta | None:
    """Cut a delta that multiplies W. Other deltas are not cut."""
    if isinstance(delta, MaskedWeight):
        return MaskedWeight(delta.a[:, inputs], delta.b[outputs])
    if isinstance(delta, SumDelta):
        parts = (_cut_delta(part, inputs, outputs) for part in delta.parts)
        return SumDelta(tuple(part for part in parts if part is not None))
    return delta


def _has_parts(name: str, module: ModulePlan, layout: ShardLayout) -> bool:
    """Return True if a rank other than 0 has tensors of this module.

    The bias of a summed output does not count: only rank 0 adds it.
    """
    n_parts = sum(1 for _ in module.tensors())
    return n_parts > int(module.bias is not None and layout.is_summed(name))


def _cut_experts(plan: ExpertPlan, layout: ShardLayout, rank: int) -> ExpertPlan:
    return replace(
        plan,
        experts=tuple(
            {name: cut_module(name, module, layout, rank) for name, module in expert.items()}
            for expert in plan.experts
        ),
    )


def _cut_weights(
    weights: Mapping[str, Tensor], layout: ShardLayout, rank: int
) -> dict[str, Tensor]:
    return {
        name: layout.cut_weight(name, weight, rank) if layout.is_cut(name) else weight
        for name, weight in weights.items()
        if rank == 0 or layout.is_cut(name)
    }


def _unrolled(module: ModulePlan) -> ModulePlan:
    if module.shared is None:
        return module
    a, b = module.shared.factors()
    if module.a is not None and module.b is not None:
        a, b = torch.cat([module.a, a]), torch.cat([module.b, b], dim=1)
    return replace(module, a=a, b=b, shared=None)


def _at(tensor: Tensor | None, index: tuple[slice, ...]) -> Tensor | None:
    return None if tensor is None else tensor[index]
