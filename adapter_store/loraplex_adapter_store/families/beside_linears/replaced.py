"""Families that replace parameters of the base.

LN tuning trains the weights and biases of norms. Trainable tokens, and canonical-example edits by
rows, train rows of the embedding.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.families.contract import Fold, ReadContext
from loraplex_adapter_store.families.extras import fold_with_extras, parameter_shape
from loraplex_adapter_store.families.module_groups import module_keys
from loraplex_adapter_store.files.targets import expand_targets, module_names, targets_among
from loraplex_adapter_store.plan import Family, NormPlan

_LAYER = "ln_tuning_layers"


def read_layer_norms(context: ReadContext) -> Fold:
    base = context.base
    targets = targets_among(context.config, base, module_names(base))
    others = sorted(name for name in targets if name in base.modules or name in base.embeddings)
    if others:
        raise UnsupportedAdapter(
            f"LN_TUNING adapts norms only, its config targets {', '.join(others[:3])}; leave them "
            "out of target_modules and name them in modules_to_save",
            others,
        )
    suffixes = (f"{_LAYER}.weight", f"{_LAYER}.bias")
    norms: dict[str, NormPlan] = {}
    for module, keys in module_keys(context, targets, suffixes).items():
        weight, bias = (_part(context, module, part, keys) for part in ("weight", "bias"))
        norms[module] = NormPlan(weight=weight, bias=bias)
    fold = fold_with_extras(context, Family.LN_TUNING, "norms replaced, no scale", {})
    return fold._replace(plan=replace(fold.plan, norms={**fold.plan.norms, **norms}))


def _part(context: ReadContext, module: str, part: str, keys: Mapping[str, str]) -> Tensor | None:
    """Load a parameter of a norm; None if the base's norm has no such parameter."""
    suffix = f"{_LAYER}.{part}"
    if suffix in keys:
        shape = parameter_shape(context, module, part, keys[suffix])
        return context.ledger.take(keys[suffix], shape)
    if f"{module}.{part}" in context.base.parameters:
        lost = f"{module}.{suffix}"
        raise AdapterMismatch(f"{module} is incomplete: it lacks {lost}", missing_keys=(lost,))
    return None


def read_trainable_tokens(context: ReadContext) -> Fold:
    tables = {context.base.input_embedding, context.base.output_head}
    elsewhere = sorted(expand_targets(context.config, context.base) - tables)
    if elsewhere:
        raise UnsupportedAdapter(
            f"trainable tokens on {', '.join(elsewhere)}: only embedding and head have token rows"
        )
    fold = fold_with_extras(context, Family.TOKENS, "rows replaced, no scale", {})
    if not fold.plan.embedding_rows and not fold.plan.head_rows:
        raise AdapterMismatch(
            "the file lacks trainable_tokens_delta of the base's embedding",
            context.ledger.unclaimed,
            unexpected_keys=context.ledger.unclaimed,
            missing_keys=(f"{context.base.input_embedding}.trainable_tokens_delta",),
        )
    return fold
