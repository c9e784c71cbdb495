"""MixLoRA: routed LoRA experts on MLP blocks, in the files of MoE-PEFT and the mixlora package.

attention   plain LoRA
MLP block   Σ_e w_e MLP_e(h), p = softmax(gate h), MLP_e with its own LoRAs on the projections;
            w is the top-k of p, renormalised (``mixlora``), p up to a sum of top_p
            (``mixlora-dynamic``), or the largest p (``mixlora-switch``)

The weights of the last two do not sum to 1, so they scale a block even if no expert has a LoRA.

Published keys ``mixlora.layers.{i}.mlp.{p}.experts.{e}.lora_A.weight`` and
``….mlp.moe_gate.weight``; legacy ones ``….gate.weight`` and ``….experts.{e}.{w1|w2|w3}_proj.…``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import (
    AdapterMismatch,
    LimitExceeded,
    MalformedFile,
    UnsupportedAdapter,
)
from loraplex_adapter_store.families.contract import Fold, ReadContext
from loraplex_adapter_store.families.extras import fold_with_extras
from loraplex_adapter_store.families.module_groups import Parts, module_group
from loraplex_adapter_store.families.scaling import lora_scale, scale_rule
from loraplex_adapter_store.files.adapter_config import AdapterConfig
from loraplex_adapter_store.files.targets import layer_index, targets_among
from loraplex_adapter_store.plan import ExpertPlan, Family, ModulePlan, RoutingStrategy

_KEY = re.compile(
    r"mixlora\.layers\.(?P<layer>\d+)\."
    r"(?:(?P<block>self_attn|attn|mlp)\.)?"
    r"(?:(?P<gate>moe_gate|gate)\.weight"
    r"|(?:(?P<projection>\w+)\.)?experts\.(?P<expert>\d+)\.(?:(?P<legacy>\w+)\.)?"
    r"lora_(?P<part>[AB])\.weight"
    r"|(?P<plain>\w+)\.lora_(?P<plain_part>[AB])\.weight)"
)
_LEGACY_NAMES = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}
_STRATEGIES = {
    "mixlora": RoutingStrategy.TOP_K,
    "mixtral": RoutingStrategy.TOP_K,  # legacy name
    "mixlora-dynamic": RoutingStrategy.TOP_P,
    "mixlora-switch": RoutingStrategy.SWITCH,
    "switch": RoutingStrategy.SWITCH,  # legacy name
}

_GATE = "moe_gate.weight"
_PAIR = Parts(required=("A", "B"))

Pair = dict[str, str]  # "A" and "B" → key


class _Keys(NamedTuple):
    gates: dict[str, str]  # block → key
    experts: dict[str, dict[int, Pair]]  # projection → expert → pair
    plain: dict[str, Pair]  # projection → pair


def read(context: ReadContext) -> Fold:
    config, base = context.config, context.base
    strategy = _strategy(config)
    n_experts, top_k, top_p = _counts(context)
    _check_activation(config, base)
    if "classifier" in context.ledger.names:
        raise UnsupportedAdapter("this MixLoRA carries a classifier head; only text is served")
    if config.flag("use_dora"):
        context.notes.append(
            "use_dora: MixLoRA files keep no magnitudes, so the scale m/‖W+sBA‖ is 1 as on load"
        )
    if strategy is RoutingStrategy.SWITCH:
        context.warnings.append(
            "mixlora-switch: served by its training formula without the capacity limit"
        )
    keys = _sort_keys(context)
    _check_mixlora(context, keys, n_experts)
    modules = {
        name: _pair(context, config, name, pair) for name, pair in sorted(keys.plain.items())
    }
    expert_config = _expert_config(config)
    experts: dict[str, ExpertPlan] = {}
    for block, gate_key in keys.gates.items():
        gate = context.ledger.take(gate_key, (n_experts, base.hidden_size))
        projections = [name for name in keys.experts if name.startswith(f"{block}.")]
        if not projections and strategy is RoutingStrategy.TOP_K:
            context.notes.append(f"{gate_key}: weights that sum to 1 over equal experts, dropped")
            continue
        experts[block] = ExpertPlan(
            gate=gate,
            strategy=strategy,
            top_k=top_k,
            top_p=top_p,
            experts=tuple(
                {
                    name: _pair(context, expert_config, name, keys.experts[name][number])
                    for name in projections
                }
                for number in range(n_experts)
            ),
        )
    rule = f"{scale_rule(config)}; experts {scale_rule(expert_config)}"
    return fold_with_extras(context, Family.MIXLORA, rule, modules, experts)


def _strategy(config: AdapterConfig) -> RoutingStrategy:
    name = config.text("routing_strategy", "mixlora") or "mixlora"
    if name not in _STRATEGIES:
        raise UnsupportedAdapter(
            f"routing_strategy {name!r} cannot be served; known: {', '.join(_STRATEGIES)}"
        )
    if name == "mixlora-dynamic" and config.number("temperature", 0.0) != 0.0:
        raise UnsupportedAdapter("mixlora-dynamic with a temperature scales sums of weights oddly")
    return _STRATEGIES[name]


def _counts(context: ReadContext) -> tuple[int, int, float]:
    """Return num_experts, top_k and top_p."""
    n_experts = context.config.integer("num_experts", 8)
    top_k, top_p = context.config.integer("top_k", 2), context.config.number("top_p", 0.8)
    limit = context.limits.max_experts
    if not 1 <= n_experts <= limit:
        raise LimitExceeded(
            f"adapter_config.json: num_experts is {n_experts}, this server allows 1 to {limit}"
        )
    if not 1 <= top_k <= n_experts:
        raise MalformedFile(f"adapter_config.json: top_k {top_k} does not fit {n_experts} experts")
    if not 0 < top_p <= 1:
        raise MalformedFile(f"adapter_config.json: top_p is {top_p}, above 0 to 1 is needed")
    return n_experts, top_k, top_p


def _check_activation(config: AdapterConfig, base: BaseSpec) -> None:
    wanted = config.text("act_fn") or base.hidden_act
    if wanted != base.hidden_act:
        raise UnsupportedAdapter(f"act_fn {wanted!r} differs from the base's {base.hidden_act!r}")


def _expert_config(config: AdapterConfig) -> AdapterConfig:
    """Return the config with the fields that ``expert_lora`` overrides for the experts."""
    override = config.section("expert_lora")
    return config if override is None else config.overridden_by(override)


def _sort_keys(context: ReadContext) -> _Keys:
    keys = _Keys({}, {}, {})
    for key in context.ledger.names:
        match = _KEY.fullmatch(key)
        if match is None:
            continue
        parts = match.groupdict()
        blocks = _blocks(context.base, int(parts["layer"]))
        block = next((b for b in blocks if b.endswith(f".{parts['block']}")), None)
        if parts["block"] is None:
            block = next((b for b in blocks if b.endswith(".mlp")), None)
        if block is not None:
            _sort_key(context.base, keys, key, block, parts)
    return keys


def _sort_key(
    base: BaseSpec, keys: _Keys, key: str, block: str, parts: Mapping[str, str | None]
) -> None:
    if parts["gate"]:
        keys.gates[block] = key
    elif parts["expert"]:
        leaf = parts["projection"] or parts["legacy"] or ""
        name = f"{block}.{_LEGACY_NAMES.get(leaf, leaf)}"
        if name in base.modules and parts["part"]:
            pair = keys.experts.setdefault(name, {}).setdefault(int(parts["expert"]), {})
            pair[parts["part"]] = key
    elif parts["plain"] and parts["plain_part"]:
        name = f"{block}.{parts['plain']}"
        if name in base.modules:
            keys.plain.setdefault(name, {})[parts["plain_part"]] = key


def _blocks(base: BaseSpec, layer: int) -> list[str]:
    """Return the attention and MLP blocks of one layer, as "model.layers.0.mlp"."""
    modules = _trunk_modules(base)
    parents = (name.rpartition(".")[0] for name in modules if layer_index(name) == layer)
    return list(dict.fromkeys(parents))


def _trunk_modules(base: BaseSpec) -> Sequence[str]:
    """Return the language model's linears. A tower has layers of the same numbers."""
    trunk = base.input_embedding.rpartition(".")[0]
    return [name for name in base.modules if name.startswith(f"{trunk}.")] or [*base.modules]


def _check_mixlora(context: ReadContext, keys: _Keys, n_experts: int) -> None:
    wanted = _targets(context)
    mlp = frozenset(name for name in wanted if ".mlp." in name)
    _require_same("attention modules", wanted - mlp, frozenset(keys.plain))
    _require_same("expert modules", mlp, frozenset(keys.experts))
    blocks = frozenset(
        block
        for layer in range(context.base.n_layers)
        for block in _blocks(context.base, layer)
        if block.endswith(".mlp")
    )
    gates = frozenset(f"{block}.{_GATE}" for block in keys.gates)
    _require_same("gates", frozenset(f"{block}.{_GATE}" for block in blocks), gates)
    _require_experts(keys, n_experts)


def _targets(context: ReadContext) -> frozenset[str]:
    """Expand the targets. Legacy configs name MLP projections w1_proj, w2_proj and w3_proj."""
    config, modules = context.config, _trunk_modules(context.base)
    names = config.names("target_modules")
    if names is not None and not isinstance(names, str):
        renamed: list[str] = [_LEGACY_NAMES.get(name, name) for name in names]
        config = config.overridden_by(AdapterConfig({"target_modules": renamed}))
    return targets_among(config, context.base, (*modules, *context.base.embeddings))


def _require_same(what: str, wanted: frozenset[str], stored: frozenset[str]) -> None:
    missing, extra = sorted(wanted - stored), sorted(stored - wanted)
    if missing or extra:
        problems = [f"{name}: expected, not in the file" for name in missing]
        problems += [f"{name}: in the file, not in the config" for name in extra]
        raise AdapterMismatch(f"{what} do not match the config", problems, missing_keys=missing)


def _require_experts(keys: _Keys, n_experts: int) -> None:
    for name, pairs in keys.experts.items():
        if set(pairs) != set(range(n_experts)):
            raise AdapterMismatch(
                f"{name} has experts {sorted(pairs)}, the config says {n_experts}"
            )


def _pair(
    context: ReadContext, config: AdapterConfig, module: str, pair: Mapping[str, str]
) -> ModulePlan:
    rank, scale = lora_scale(config, module)
    a, b = module_group(context, module, pair, _PAIR).factors("A", "B", rank)
    return ModulePlan(a=a, b=b * scale)
