"""Virtual tokens before the prompt: prefix tuning (per-layer KV) and prompt tuning (embeddings).

Prefix tuning and cartridges save one tensor [n_virtual, n_layers · 2 · n_kv_heads · head_dim]; PEFT
has applied the MLP. Real tokens start at position n_virtual. Prompt tuning, P-tuning and CPT save
[n_virtual, hidden]. Multitask prompt tuning multiplies these embeddings, entry by entry, by one
low-rank matrix for each task; one task is served.
"""

from torch import Tensor

from loraplex_adapter_store.errors import (
    AdapterMismatch,
    LimitExceeded,
    MalformedFile,
    UnsupportedAdapter,
)
from loraplex_adapter_store.families.contract import Fold, ReadContext
from loraplex_adapter_store.plan import AdapterPlan, Family, PrefixPlan

_KEY = "prompt_embeddings"


def read_prefix(context: ReadContext) -> Fold:
    base = context.base
    n_virtual = _n_virtual(context)
    width = base.n_layers * 2 * base.n_kv_heads * base.head_dim
    flat = context.ledger.take(_key(context), (n_virtual, width))
    layers = flat.view(n_virtual, base.n_layers, 2, base.n_kv_heads, base.head_dim)
    prefix = PrefixPlan(
        keys=tuple(layers[:, layer, 0].clone() for layer in range(base.n_layers)),
        values=tuple(layers[:, layer, 1].clone() for layer in range(base.n_layers)),
    )
    plan = AdapterPlan("", Family.PREFIX, {}, prefix=prefix)
    return Fold(plan, f"{n_virtual} virtual tokens per layer")


def read_prompt(context: ReadContext) -> Fold:
    n_virtual = _n_virtual(context)
    embeddings = context.ledger.take(_key(context), (n_virtual, context.base.hidden_size))
    return _of_embeddings(embeddings, f"{n_virtual} virtual token embeddings")


def read_multitask_prompt(context: ReadContext) -> Fold:
    config, ledger = context.config, context.ledger
    n_virtual, hidden = _n_virtual(context), context.base.hidden_size
    n_tasks, rank = config.integer("num_tasks", 1), config.integer("num_ranks", 1)
    task = config.integer("loraplex_task_id", 0)
    if n_tasks > 1 and config.get("loraplex_task_id") is None:
        raise UnsupportedAdapter(
            f"this prompt has {n_tasks} tasks and requests name no task: add it once for each, "
            'with "loraplex_task_id": 0 and so on in adapter_config.json'
        )
    if not 0 <= task < n_tasks:
        raise MalformedFile(f"adapter_config.json: loraplex_task_id {task} of {n_tasks} tasks")
    columns = ledger.take(_key(context, "prefix_task_cols"), (n_tasks, n_virtual, rank))[task]
    rows = ledger.take(_key(context, "prefix_task_rows"), (n_tasks, rank, hidden))[task]
    embeddings = ledger.take(_key(context), (n_virtual, hidden)) * (columns @ rows)
    rule = f"{n_virtual} virtual token embeddings, task {task} of {n_tasks}"
    return _of_embeddings(embeddings, rule)


def _of_embeddings(embeddings: Tensor, rule: str) -> Fold:
    return Fold(AdapterPlan("", Family.PROMPT, {}, prefix=PrefixPlan(embeddings=embeddings)), rule)


def _n_virtual(context: ReadContext) -> int:
    if context.config.integer("num_transformer_submodules", 1) != 1:
        raise UnsupportedAdapter("prompts of encoder-decoder models cannot be served here")
    n_virtual = context.config.integer("num_virtual_tokens")
    if n_virtual > context.limits.max_virtual_tokens:
        raise LimitExceeded(
            f"{n_virtual} virtual tokens, this server allows {context.limits.max_virtual_tokens}"
        )
    return n_virtual


def _key(context: ReadContext, name: str = _KEY) -> str:
    if name not in context.ledger.names:
        raise AdapterMismatch(f"the file lacks {name}", missing_keys=(name,))
    return name
