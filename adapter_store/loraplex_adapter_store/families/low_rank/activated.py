"""Activated LoRA (``alora_invocation_tokens``): a LoRA that acts from its invocation on.

The invocation is the last place in the prompt where these tokens stand, as in PEFT. Tokens before
it are the base's, keys and values included. Without an invocation the adapter does not act at all.
"""

from dataclasses import fields

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import MalformedFile, UnsupportedAdapter
from loraplex_adapter_store.families.contract import ReadContext
from loraplex_adapter_store.plan import AdapterPlan, ModulePlan

_KEY = "alora_invocation_tokens"
_TASKS = (None, "CAUSAL_LM")
_MASKED = ("a", "b", "bias")  # the parts of a linear that begin at the invocation


def read_invocation(context: ReadContext) -> tuple[int, ...] | None:
    """Return the invocation tokens; None for an adapter without any. Raises AdapterRefused."""
    tokens, size = context.config.get(_KEY), context.base.vocab_size
    if tokens is None:
        return None
    if (
        not isinstance(tokens, list)
        or not tokens
        or not all(type(token) is int and 0 <= token < size for token in tokens)
    ):
        raise MalformedFile(
            f"adapter_config.json: {_KEY} is {str(tokens)[:80]}, a list of token ids below {size} "
            "is needed"
        )
    task = context.config.text("task_type")
    if task not in _TASKS:
        raise UnsupportedAdapter(f"activated LoRA of the task {task}: it needs CAUSAL_LM")
    if context.config.text("bias", "none") != "none":
        raise UnsupportedAdapter(
            "activated LoRA with trained biases: they act before the invocation too; train with "
            'bias="none"'
        )
    context.notes.append(
        f"acts from the last {tokens} of a prompt on; a prompt without them gets the base's answer"
    )
    return tuple(tokens)


def check_activated(plan: AdapterPlan, base: BaseSpec) -> None:
    """Raises UnsupportedAdapter for parts of an activated LoRA that act before the invocation."""
    if plan.invocation is None:
        return
    beside = {
        "experts and routers": plan.stacked,
        "trained tokens": {**plan.embedding_rows, **plan.head_rows},
        "modules_to_save": {**plan.replaced_weights, **plan.norms},
        **{name: _unmasked(plan.modules[name]) for name in plan.modules},
    }
    lost = [part for part, value in beside.items() if value]
    lost += [name for name in plan.modules if name in (*base.embeddings, base.output_head)]
    if lost:
        raise UnsupportedAdapter(
            f"activated LoRA with {lost[0]}: only the factors of linears in the layers begin at "
            "the invocation; leave it out of the targets",
            lost,
        )


def _unmasked(module: ModulePlan) -> list[str]:
    return [
        spec.name
        for spec in fields(module)
        if spec.name not in _MASKED and getattr(module, spec.name) is not None
    ]
