"""Random adapters with routed experts, as folded plans, for any model of the Llama layout."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan, ExpertPlan, Family, ModulePlan, RoutingStrategy

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def _linears(model: PreTrainedModel, leaves: Sequence[str]) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in leaves
    }


def _low_rank(linear: nn.Linear, rank: int, g: torch.Generator, size: float) -> ModulePlan:
    a = torch.randn(rank, linear.in_features, generator=g) * (size / rank**0.5)
    b = torch.randn(linear.out_features, rank, generator=g) * size
    return ModulePlan(a=a, b=b)


def lora_plan(
    model: PreTrainedModel, *, rank: int, seed: int, leaves: Sequence[str] = (*ATTENTION, *MLP)
) -> AdapterPlan:
    g = torch.Generator().manual_seed(seed)
    modules = {name: _low_rank(m, rank, g, 0.3) for name, m in _linears(model, leaves).items()}
    return AdapterPlan(digest=f"{seed:064x}", family=Family.LORA, modules=modules)


def mixlora_plan(
    model: PreTrainedModel,
    *,
    n_experts: int,
    top_k: int,
    rank: int,
    seed: int,
    strategy: RoutingStrategy = RoutingStrategy.TOP_K,
    top_p: float = 0.6,
    expert_rank: int | None = None,
) -> AdapterPlan:
    """Return attention factors of ``rank`` and experts of ``expert_rank`` on every MLP block."""
    g = torch.Generator().manual_seed(seed)
    modules = {name: _low_rank(m, rank, g, 0.3) for name, m in _linears(model, ATTENTION).items()}
    blocks: dict[str, dict[str, nn.Linear]] = {}
    for name, linear in _linears(model, MLP).items():
        blocks.setdefault(name.rpartition(".")[0], {})[name] = linear
    experts = {
        block: ExpertPlan(
            gate=_gate(n_experts, linears[f"{block}.gate_proj"].in_features, g),
            strategy=strategy,
            top_k=top_k,
            top_p=top_p,
            experts=tuple(
                {n: _low_rank(m, expert_rank or rank, g, 0.3) for n, m in linears.items()}
                for _ in range(n_experts)
            ),
        )
        for block, linears in blocks.items()
    }
    return AdapterPlan(
        digest=f"{seed:064x}", family=Family.MIXLORA, modules=modules, experts=experts
    )


def projection_plan(
    model: PreTrainedModel,
    *,
    n_experts: int,
    top_k: int,
    ranks: Sequence[int],
    seed: int,
    strategy: RoutingStrategy = RoutingStrategy.TOP_K,
    leaves: Sequence[str] = (*ATTENTION, *MLP),
) -> AdapterPlan:
    """Return experts with a gate on each projection; expert e has rank ``ranks[e % n]``."""
    g = torch.Generator().manual_seed(seed)
    experts = {
        name: ExpertPlan(
            gate=_gate(n_experts, linear.in_features, g),
            strategy=strategy,
            top_k=top_k,
            top_p=0.0,
            experts=tuple(
                {name: _low_rank(linear, ranks[e % len(ranks)], g, 0.3)} for e in range(n_experts)
            ),
        )
        for name, linear in _linears(model, leaves).items()
    }
    family = Family.LORAMOE if strategy is RoutingStrategy.DENSE else Family.MOLA
    return AdapterPlan(digest=f"{seed:064x}", family=family, modules={}, experts=experts)


def scaled_plan(model: PreTrainedModel, *, seed: int, rank: int = 0) -> AdapterPlan:
    """Return vectors of IA³ and LoFiT; with a rank, factors where inputs are scaled, too."""
    g = torch.Generator().manual_seed(seed)
    modules = {}
    for name, linear in _linears(model, ("k_proj", "v_proj", "o_proj", "down_proj")).items():
        leaf = name.rpartition(".")[2]
        if leaf in ("k_proj", "v_proj"):
            modules[name] = ModulePlan(out_scale=torch.rand(linear.out_features, generator=g) + 0.5)
            continue
        low_rank = _low_rank(linear, rank, g, 0.3) if rank else ModulePlan()
        bias = torch.randn(linear.out_features, generator=g) * 0.3 if leaf == "o_proj" else None
        scale = torch.rand(linear.in_features, generator=g) + 0.5
        modules[name] = ModulePlan(a=low_rank.a, b=low_rank.b, bias=bias, in_scale=scale)
    return AdapterPlan(digest=f"{seed:064x}", family=Family.IA3, modules=modules)


def scaled_slices_plan(model: PreTrainedModel, *, seed: int, rank: int = 0) -> AdapterPlan:
    """Return a plan that scales the inputs of some linears among those that share them.

    IA³ does so with up_proj among its feed-forward modules. With a rank, factors come on top.
    """
    g = torch.Generator().manual_seed(seed)
    modules = {}
    for name, linear in _linears(model, ("q_proj", "v_proj", "up_proj")).items():
        low_rank = _low_rank(linear, rank, g, 0.3) if rank else ModulePlan()
        scales = torch.rand(linear.in_features, generator=g) + 0.5
        out_scale = torch.rand(linear.out_features, generator=g) + 0.5 if rank else None
        modules[name] = replace(low_rank, in_scale=scales, out_scale=out_scale)
    return AdapterPlan(digest=f"{seed:064x}", family=Family.IA3, modules=modules)


def mixdora_plan(
    model: PreTrainedModel, *, n_experts: int, top_k: int, rank: int, seed: int
) -> AdapterPlan:
    """Return experts that each scale and shift their down outputs."""
    g = torch.Generator().manual_seed(seed)
    plan = mixlora_plan(model, n_experts=n_experts, top_k=top_k, rank=rank, seed=seed)

    def dora(name: str, module: ModulePlan) -> ModulePlan:
        if not name.endswith("down_proj") or module.b is None:
            return module
        width = module.b.shape[0]
        bias = torch.randn(width, generator=g) * 0.1
        return replace(module, out_scale=torch.rand(width, generator=g) + 0.5, bias=bias)

    experts = {
        block: replace(
            e, experts=tuple({n: dora(n, m) for n, m in one.items()} for one in e.experts)
        )
        for block, e in plan.experts.items()
    }
    return replace(plan, experts=experts)


def _gate(n_experts: int, width: int, g: torch.Generator) -> Tensor:
    return torch.randn(n_experts, width, generator=g)
