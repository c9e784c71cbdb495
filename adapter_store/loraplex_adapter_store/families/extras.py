"""What PEFT saves beside the method: biases, modules_to_save, trainable tokens, base copies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, MalformedFile, UnsupportedAdapter
from loraplex_adapter_store.plan import ExpertPlan, Family, ModulePlan, NormPlan
from loraplex_adapter_store.targets import ties_head
from loraplex_adapter_store.tensor_names import module_names, resolve_module, split_key

from .contract import Fold, ReadContext

__all__ = ["fold_with_extras"]

_TOKENS = "trainable_tokens_delta"
_SAVED, _ORIGINAL = ".modules_to_save", ".original_module"
_COPY_TOLERANCE = 1e-2  # relative; copies may have gone through bfloat16


def fold_with_extras(
    context: ReadContext,
    family: Family,
    scale_rule: str,
    modules: Mapping[str, ModulePlan],
    experts: Mapping[str, ExpertPlan] | None = None,
) -> Fold:
    """The fold of a method that adapts ``modules``, and of all that was saved beside them.

    Claims every remaining tensor it can explain; the rest is refused. Raises AdapterRefused.
    """
    extras = _read_extras(context, modules)
    return Fold(
        family=family,
        scale_rule=scale_rule,
        modules=extras.modules,
        experts=experts or {},
        embedding_rows=extras.embedding_rows,
        head_rows=extras.head_rows,
        replaced_weights=extras.replaced_weights,
        norms=extras.norms,
    )


@dataclass(frozen=True, slots=True)
class _Extras:
    modules: Mapping[str, ModulePlan]
    embedding_rows: Mapping[int, Tensor]
    head_rows: Mapping[int, Tensor]
    replaced_weights: Mapping[str, Tensor]
    norms: Mapping[str, NormPlan]


def _read_extras(context: ReadContext, modules: Mapping[str, ModulePlan]) -> _Extras:
    grown = dict(modules)
    replaced_weights: dict[str, Tensor] = {}
    norms: dict[str, NormPlan] = {}
    rows: dict[str, dict[int, Tensor]] = {}
    biased: set[str] = set()
    names = module_names(context.base)
    _drop_twins(context, names)
    for key in context.ledger.unclaimed:
        split = split_key(
            key, ("base_layer.weight", "base_layer.bias", _token_key(key), "weight", "bias")
        )
        module = None if split is None else resolve_module(split[0], names)
        if split is None or module is None:
            continue
        suffix = split[1]
        if suffix.endswith(_TOKENS):
            rows[module] = _token_rows(context, module, key)
        elif suffix == "base_layer.weight":
            _check_copy(context, module, key)
        elif _is_norm(context, module):
            if suffix == "bias" or _is_saved(context, module):
                norms[module] = _with_norm_part(context, module, suffix, key, norms.get(module))
        elif suffix.endswith("bias"):
            grown[module] = _with_bias(context, module, key, grown.get(module))
            biased.add(module)
        elif _is_saved(context, module):
            replaced_weights[module] = _saved_weight(context, module, key)
        elif module in context.base.embeddings or module == context.base.output_head:
            _check_copy(context, module, key)
    _check_saved(context, replaced_weights.keys() | norms.keys())
    _check_biases(context, modules, biased)
    _check_norms(context, norms)
    _tie(context, rows, replaced_weights)
    embedding_rows = rows.pop(context.base.input_embedding, {})
    head_rows = rows.pop(context.base.output_head, {})
    if rows:
        raise UnsupportedAdapter(f"trainable tokens on {sorted(rows)}: only embedding and head")
    return _Extras(grown, embedding_rows, head_rows, replaced_weights, norms)


def _drop_twins(context: ReadContext, names: Collection[str]) -> None:
    """With bias="all" PEFT saves the biases of modules_to_save twice more: ours and the base's."""
    for key in context.ledger.unclaimed:
        path, _, leaf = key.rpartition(".")
        module = resolve_module(path.removesuffix(_SAVED).removesuffix(_ORIGINAL), names)
        twin = key.replace(f"{_SAVED}.", ".")
        if path.endswith(_SAVED) and twin in context.ledger.names:
            if context.ledger.raw(key) != context.ledger.raw(twin):
                raise AdapterMismatch(f"{key} and {twin} differ")
            context.ledger.claim(key)
            context.notes.append(f"{key}: the same as {twin}")
        elif path.endswith(_ORIGINAL) and f"{module}.{leaf}" in context.base.parameters:
            _check_copy_of(context, f"{module}.{leaf}", key)


def _token_key(key: str) -> str:
    return f"token_adapter.{_TOKENS}" if f".token_adapter.{_TOKENS}" in key else _TOKENS


def _token_rows(context: ReadContext, module: str, key: str) -> dict[int, Tensor]:
    width = context.base.hidden_size
    values = context.ledger.take(key, (None, width))
    indices = _token_indices(context, module)
    if len(indices) != values.shape[0]:
        raise AdapterMismatch(
            f"{key} holds {values.shape[0]} rows, the config lists {len(indices)} token ids"
        )
    return {index: values[position].clone() for position, index in enumerate(indices)}


def _token_indices(context: ReadContext, module: str) -> list[int]:
    value = context.config.get("trainable_token_indices")
    if value is None:
        value = context.config.get("token_indices")
    if isinstance(value, dict):
        leaf = module.rpartition(".")[2]
        listed = value.get(module, value.get(leaf))
        if listed is None and module == context.base.output_head:  # tied: those of the embedding
            listed = next(iter(value.values()), None)
        value = listed
    if not isinstance(value, list) or not all(
        type(index) is int and 0 <= index < context.base.vocab_size for index in value
    ):
        raise MalformedFile(
            f"adapter_config.json: the trainable token ids of {module} are {value!r}, a list of "
            f"ids below {context.base.vocab_size} is needed"
        )
    if len(set(value)) != len(value):
        raise MalformedFile(f"adapter_config.json: {module} lists a trainable token id twice")
    return value


def _check_copy(context: ReadContext, module: str, key: str) -> None:
    """PEFT saves the untouched base layer beside an adapted embedding: it must be the base's."""
    name = f"{module}.weight"
    if name not in context.base.parameters:
        raise AdapterMismatch(f"{key}: {module} of the base has no weight")
    _check_copy_of(context, name, key)


def _check_copy_of(context: ReadContext, name: str, key: str) -> None:
    want = context.base.parameter(name)
    have = context.ledger.take(key, tuple(want.shape))
    if not torch.allclose(
        have, want, rtol=_COPY_TOLERANCE, atol=_COPY_TOLERANCE * float(want.std())
    ):
        raise UnsupportedAdapter(
            f"{key} is a base weight that differs from this base: trained on another base, or "
            "the vocabulary was resized; name it in modules_to_save if it was trained"
        )
    context.notes.append(f"{key}: copy of the base weight, verified and dropped")


def _with_bias(context: ReadContext, module: str, key: str, plan: ModulePlan | None) -> ModulePlan:
    """A trained base bias (bias="all" or "lora_only"): the plan adds what it differs by."""
    base_bias = context.base.bias(module)
    if base_bias is None or module not in context.base.modules:
        raise AdapterMismatch(f"{key}: {module} of the base has no bias")
    difference = context.ledger.take(key, tuple(base_bias.shape)) - base_bias
    if plan is None:
        return ModulePlan(bias=difference)
    return replace(plan, bias=difference if plan.bias is None else plan.bias + difference)


def _is_norm(context: ReadContext, module: str) -> bool:
    return module not in context.base.modules and module not in context.base.embeddings


def _with_norm_part(
    context: ReadContext, module: str, suffix: str, key: str, plan: NormPlan | None
) -> NormPlan:
    """A trained weight (modules_to_save, LN tuning) or bias (bias="all") of a norm."""
    if suffix not in ("weight", "bias"):
        raise AdapterMismatch(f"{key}: {module} of the base is no linear and no embedding")
    stored = context.base.parameters.get(f"{module}.{suffix}")
    if stored is None:
        raise AdapterMismatch(f"{key}: {module} of the base has no {suffix}")
    value = context.ledger.take(key, stored)
    plan = plan or NormPlan()
    return replace(plan, weight=value) if suffix == "weight" else replace(plan, bias=value)


def _is_saved(context: ReadContext, module: str) -> bool:
    base = context.base
    if module == base.output_head and ties_head(context.config, base):
        return _is_saved(context, base.input_embedding) or _ends_with_saved(context, module)
    return _ends_with_saved(context, module)


def _ends_with_saved(context: ReadContext, module: str) -> bool:
    return any(module.endswith(name) for name in _saved_names(context))


def _check_norms(context: ReadContext, norms: Mapping[str, NormPlan]) -> None:
    """A saved norm has all of its parameters in the file."""
    lost = [
        f"{module}.{part}"
        for module, norm in norms.items()
        for part, value in (("weight", norm.weight), ("bias", norm.bias))
        if value is None
        and _is_saved(context, module)
        and f"{module}.{part}" in context.base.parameters
    ]
    if lost:
        raise AdapterMismatch(
            f"modules_to_save lists {lost[0].rpartition('.')[0]}, the file lacks a part of it",
            lost,
            missing_keys=lost,
        )


def _saved_names(context: ReadContext) -> tuple[str, ...]:
    names = context.config.names("modules_to_save") or ()
    return (names,) if isinstance(names, str) else names


def _saved_weight(context: ReadContext, module: str, key: str) -> Tensor:
    stored = context.base.parameters.get(f"{module}.weight")
    if stored is None:
        raise AdapterMismatch(f"{key}: {module} of the base has no weight")
    value = context.ledger.take(key, stored)
    return value.t().contiguous() if module in context.base.conv1d else value


def _check_biases(context: ReadContext, modules: Iterable[str], found: Iterable[str]) -> None:
    """``bias`` promises the biases of all linears, or of the adapted ones."""
    promised = context.config.text("bias", "none")
    if promised == "none":
        return
    wanted = context.base.modules if promised == "all" else modules
    lost = sorted(
        module
        for module in wanted
        if module in context.base.modules and context.base.modules[module].has_bias
    )
    lost = [f"{module}.bias" for module in lost if module not in set(found)]
    if lost:
        raise AdapterMismatch(
            f"the config says bias={promised!r}, the file lacks {len(lost)} of these biases",
            lost,
            missing_keys=lost,
        )


def _check_saved(context: ReadContext, found: Collection[str]) -> None:
    for name in _saved_names(context):
        expected = [module for module in _weighted(context) if module.endswith(name)]
        missing = [module for module in expected if module not in found]
        if missing:
            raise AdapterMismatch(
                f"modules_to_save lists {name!r}, the file lacks it",
                [f"{module}.weight" for module in missing],
                missing_keys=missing,
            )


def _weighted(context: ReadContext) -> list[str]:
    return [
        name.removesuffix(".weight") for name in context.base.parameters if name.endswith(".weight")
    ]


def _tie(
    context: ReadContext, rows: dict[str, dict[int, Tensor]], replaced_weights: dict[str, Tensor]
) -> None:
    """With tied embeddings PEFT applies trained rows to the head too."""
    base, ensured = context.base, ties_head(context.config, context.base)
    if not base.tie_word_embeddings:
        return
    if base.input_embedding in rows:
        rows.setdefault(base.output_head, dict(rows[base.input_embedding]))
    if ensured and base.input_embedding in replaced_weights:
        replaced_weights.setdefault(base.output_head, replaced_weights[base.input_embedding])
