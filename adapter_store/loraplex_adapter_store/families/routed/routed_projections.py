"""Routed LoRA experts on single projections: MoLA and LoRAMoE.

    y = W x + Σ_e w_e s B_e A_e x,   p = softmax(gate x)

MoLA     w = the top-k of p, renormalised
LoRAMoE  w = p

Each has two formats: that of MoE-PEFT and that of its authors, who write ``peft_type: "LORA"``.

    MoE-PEFT  mola.layers.{i}.….{projection}.moe_gate.weight, ….experts.{e}.lora_A.weight
    MoLA      ….{projection}.router.router.weight, ….lora_A_{e}.weight; r, experts and top-k may
              differ by layer, and top-k is not in the config: it must be added
    LoRAMoE   ….{projection}.lora_route.weight, ….lora_A{e}.weight; ``lora_nums`` in the config

A targeted module without a gate is a plain LoRA (attention, in LoRAMoE of MoE-PEFT).
"""

from collections.abc import Sequence
from typing import NamedTuple

from loraplex_adapter_store.errors import AdapterMismatch, LimitExceeded, MalformedFile
from loraplex_adapter_store.families.contract import Fold, ReadContext
from loraplex_adapter_store.families.extras import fold_with_extras
from loraplex_adapter_store.families.module_groups import ModuleGroup, linear_groups
from loraplex_adapter_store.families.scaling import lora_scale
from loraplex_adapter_store.files.adapter_config import AdapterConfig
from loraplex_adapter_store.files.targets import layer_index
from loraplex_adapter_store.plan import ExpertPlan, Family, ModulePlan, RoutingStrategy

_PLAIN = ("lora_A.weight", "lora_B.weight")


class _Format(NamedTuple):
    """Tensor names of one projection; ``{}`` is the number of the expert."""

    gate: str
    a: str
    b: str

    def pair(self, expert: int) -> tuple[str, str]:
        return self.a.format(expert), self.b.format(expert)


_MOE_PEFT = _Format("moe_gate.weight", "experts.{}.lora_A.weight", "experts.{}.lora_B.weight")
_MOLA = _Format("router.router.weight", "lora_A_{}.weight", "lora_B_{}.weight")
_LORAMOE = _Format("lora_route.weight", "lora_A{}.weight", "lora_B{}.weight")


def read_authors_format(context: ReadContext) -> Fold | None:
    """Read a file of MoLA's or LoRAMoE's own repository; None if it is another kind of LoRA."""
    for names, read in ((_MOLA, read_mola), (_LORAMOE, read_loramoe)):
        if any(key.endswith(f".{names.gate}") for key in context.ledger.names):
            return read(context)
    return None


def read_mola(context: ReadContext) -> Fold:
    return _read(context, Family.MOLA, RoutingStrategy.TOP_K, (_MOE_PEFT, _MOLA))


def read_loramoe(context: ReadContext) -> Fold:
    return _read(context, Family.LORAMOE, RoutingStrategy.DENSE, (_MOE_PEFT, _LORAMOE))


def _read(
    context: ReadContext, family: Family, strategy: RoutingStrategy, formats: Sequence[_Format]
) -> Fold:
    context.config.text("routing_strategy")  # the name of the method again
    context.config.text("act_fn")  # the activation is the base's: no expert spans it
    if context.config.flag("use_dora"):
        context.notes.append("use_dora: the experts of this method are plain LoRAs all the same")
    names = next((known for known in formats if _occurs(context, known.gate)), formats[0])
    parts = [part for e in range(context.limits.max_experts) for part in names.pair(e)]
    groups = linear_groups(context, (), (names.gate, *_PLAIN, *parts))
    modules: dict[str, ModulePlan] = {}
    experts: dict[str, ExpertPlan] = {}
    for module, group in groups.items():
        config = _of_layer(context.config, module)
        if names.gate in group:
            experts[module] = _routed(group, names, strategy, config)
        else:
            modules[module] = _pair(group, _PLAIN, config)
    _check_counts(context.config, experts)
    rule = "alpha/√r" if context.config.flag("use_rslora") else "alpha/r"
    return fold_with_extras(context, family, f"{rule} per expert", modules, experts)


def _occurs(context: ReadContext, suffix: str) -> bool:
    return any(key.endswith(f".{suffix}") for key in context.ledger.names)


def _routed(
    group: ModuleGroup, names: _Format, strategy: RoutingStrategy, config: AdapterConfig
) -> ExpertPlan:
    n_experts = group.shape(names.gate, 2)[0]
    limit = group.context.limits.max_experts
    if not 1 <= n_experts <= limit:
        raise LimitExceeded(
            f"{group.module} has {n_experts} experts, this server allows 1 to {limit}"
        )
    top_k = n_experts
    if strategy is RoutingStrategy.TOP_K:
        top_k = _top_k(config, group.module, n_experts)
    return ExpertPlan(
        gate=group.take(names.gate, n_experts, group.in_features),
        strategy=strategy,
        top_k=top_k,
        top_p=1.0,
        experts=tuple(
            {group.module: _pair(group, names.pair(expert), config)} for expert in range(n_experts)
        ),
    )


def _pair(group: ModuleGroup, parts: tuple[str, str], config: AdapterConfig) -> ModulePlan:
    group.require(*parts)
    rank, scale = lora_scale(config, group.module)
    a, b = group.factors(*parts, rank)
    return ModulePlan(a=a, b=b * scale)


def _top_k(config: AdapterConfig, module: str, n_experts: int) -> int:
    if config.get("top_k") is None:
        raise MalformedFile(
            "adapter_config.json lacks top_k, which MoLA's own trainer does not save: add the "
            'number that it was trained with, as "top_k": 2, or a list with one for each layer'
        )
    top_k = config.integer("top_k")
    if not 1 <= top_k <= n_experts:
        raise MalformedFile(
            f"adapter_config.json: top_k {top_k} does not fit the {n_experts} experts of {module}"
        )
    return top_k


def _of_layer(config: AdapterConfig, module: str) -> AdapterConfig:
    """Replace MoLA's lists, which have a value for each layer, by the value for ``module``."""
    layer = layer_index(module)
    here: dict[str, object] = {}
    for key in ("r", "top_k"):
        value = config.get(key)
        if isinstance(value, list):
            if layer is None or layer >= len(value):
                raise MalformedFile(
                    f"adapter_config.json: {key} lists {len(value)} layers, {module} is beyond"
                )
            here[key] = value[layer]
    return config.overridden_by(AdapterConfig(here))


def _check_counts(config: AdapterConfig, experts: dict[str, ExpertPlan]) -> None:
    """Raises AdapterMismatch if ``num_experts`` or ``lora_nums`` differs from the file."""
    for key in ("num_experts", "lora_nums"):
        if config.get(key) is None:
            continue
        n_stated = config.integer(key)
        for module, block in experts.items():
            if len(block.experts) != n_stated:
                raise AdapterMismatch(
                    f"{module} has {len(block.experts)} experts, the config says {key} {n_stated}"
                )
