"""Tensors that PEFT saves with any method: biases, modules_to_save, trainable tokens, copies."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, MalformedFile, UnsupportedAdapter
from loraplex_adapter_store.files.targets import (
    is_saved,
    module_names,
    resolve_module,
    split_key,
    ties_head,
)
from loraplex_adapter_store.plan import (
    AdapterPlan,
    ExpertPlan,
    Family,
    HeadTask,
    ModulePlan,
    NormPlan,
)

from .contract import Fold, ReadContext
from .module_groups import ModuleGroup, linear_groups

_TOKENS = "trainable_tokens_delta"
_SAVED, _ORIGINAL = ".modules_to_save", ".original_module"
_COPY_TOLERANCE = 1e-2  # relative; copies may have gone through bfloat16


def fold_linears(
    context: ReadContext,
    family: Family,
    scale_rule: str,
    fold: Callable[[ModuleGroup], ModulePlan],
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
    *,
    synonyms: Mapping[str, str] | None = None,
) -> Fold:
    """Fold each targeted linear by itself. The suffixes are those of ``linear_groups``.

    Raises AdapterRefused.
    """
    groups = linear_groups(context, required, optional, synonyms=synonyms)
    modules = {module: fold(group) for module, group in groups.items()}
    return fold_with_extras(context, family, scale_rule, modules)


def fold_with_extras(
    context: ReadContext,
    family: Family,
    scale_rule: str,
    modules: Mapping[str, ModulePlan],
    experts: Mapping[str, ExpertPlan] | None = None,
) -> Fold:
    """Return the fold of a method that adapts ``modules``, with everything saved beside them.

    Claims every remaining tensor that has a known meaning. Raises AdapterRefused.
    """
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
    plan = AdapterPlan(
        digest="",
        family=family,
        modules=grown,
        experts=experts or {},
        embedding_rows=embedding_rows,
        head_rows=head_rows,
        replaced_weights=replaced_weights,
        norms=norms,
    )
    return Fold(plan, scale_rule)


def parameter_shape(context: ReadContext, module: str, part: str, key: str) -> tuple[int, ...]:
    """Return the shape of a base parameter. Raises AdapterMismatch for a module without it."""
    shape = context.base.parameters.get(f"{module}.{part}")
    if shape is None:
        raise AdapterMismatch(f"{key}: {module} of the base has no {part}")
    return shape


def _drop_twins(context: ReadContext, names: Collection[str]) -> None:
    """Drop the copies of biases in modules_to_save that PEFT writes with bias="all"."""
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
        if listed is None and module == context.base.output_head:  # tied: the ids of the embedding
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
    """Drop the base layer that PEFT saves beside an adapted embedding. It must equal the base's."""
    parameter_shape(context, module, "weight", key)
    _check_copy_of(context, f"{module}.weight", key)


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
    """Add the difference of a trained bias (bias="all" or "lora_only") from the base's bias."""
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
    """Add the trained weight (modules_to_save) or bias (bias="all") of a norm."""
    if suffix not in ("weight", "bias"):
        raise AdapterMismatch(f"{key}: {module} of the base is no linear and no embedding")
    value = context.ledger.take(key, parameter_shape(context, module, suffix, key))
    return replace(plan or NormPlan(), **{suffix: value})


def _is_saved(context: ReadContext, module: str) -> bool:
    base, saved = context.base, context.config.name_list("modules_to_save")
    is_tied = module == base.output_head and ties_head(context.config, base)
    modules = (module, base.input_embedding) if is_tied else (module,)
    return any(
        each.endswith(name) or is_saved(context.config, each) for each in modules for name in saved
    )


def _check_norms(context: ReadContext, norms: Mapping[str, NormPlan]) -> None:
    """Raises AdapterMismatch if the file lacks a parameter of a saved norm."""
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


def _saved_weight(context: ReadContext, module: str, key: str) -> Tensor:
    value = context.ledger.take(key, parameter_shape(context, module, "weight", key))
    return value.t().contiguous() if module in context.base.conv1d else value


def _check_biases(context: ReadContext, modules: Iterable[str], biased: Collection[str]) -> None:
    """Raises AdapterMismatch if the file lacks a bias that the config's ``bias`` promises."""
    promised = context.config.text("bias", "none")
    if promised == "none":
        return
    linears = context.base.modules
    lost = sorted(
        f"{module}.bias"
        for module in (linears if promised == "all" else modules)
        if module in linears and linears[module].has_bias and module not in biased
    )
    if lost:
        raise AdapterMismatch(
            f"the config says bias={promised!r}, the file lacks {len(lost)} of these biases",
            lost,
            missing_keys=lost,
        )


def _check_saved(context: ReadContext, saved: Collection[str]) -> None:
    """Raises AdapterMismatch if the file lacks a weight that ``modules_to_save`` promises.

    Optional linears of the base are those before the classifier of a text, and promised with it.
    """
    optional = context.base.optional
    of_texts = (context.config.text("task_type") or "").upper() == HeadTask.SEQ_CLS
    for name in context.config.name_list("modules_to_save"):
        missing = [
            key
            for key in context.base.parameters
            if (module := key.removesuffix(".weight")) not in saved
            and (
                of_texts and is_saved(context.config, module)
                if module in optional
                else key.endswith(f"{name}.weight")
            )
        ]
        if missing:
            raise AdapterMismatch(
                f"modules_to_save lists {name!r}, the file lacks it", missing, missing_keys=missing
            )


def _tie(
    context: ReadContext, rows: dict[str, dict[int, Tensor]], replaced_weights: dict[str, Tensor]
) -> None:
    """Copy trained rows of a tied embedding to the head, as PEFT does."""
    base, ensured = context.base, ties_head(context.config, context.base)
    if not base.tie_word_embeddings:
        return
    if base.input_embedding in rows:
        rows.setdefault(base.output_head, dict(rows[base.input_embedding]))
    if ensured and base.input_embedding in replaced_weights:
        replaced_weights.setdefault(base.output_head, replaced_weights[base.input_embedding])
