"""Virtual tokens before the prompt: prefix tuning (per-layer KV) and prompt tuning (embeddings).

Prefix tuning saves one tensor [n_virtual, n_layers · 2 · n_kv_heads · head_dim]; its MLP is baked
out by PEFT. Real tokens start at position n_virtual. Prompt tuning and P-tuning save
[n_virtual, hidden].
"""

from __future__ import annotations

from loraplex_adapter_store.errors import AdapterMismatch, LimitExceeded, UnsupportedAdapter
from loraplex_adapter_store.plan import Family, PrefixPlan

from .contract import Fold, ReadContext

__all__ = ["read_prefix", "read_prompt"]

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
    return Fold(Family.PREFIX, f"{n_virtual} virtual tokens per layer", prefix=prefix)


def read_prompt(context: ReadContext) -> Fold:
    n_virtual = _n_virtual(context)
    embeddings = context.ledger.take(_key(context), (n_virtual, context.base.hidden_size))
    rule = f"{n_virtual} virtual token embeddings"
    return Fold(Family.PROMPT, rule, prefix=PrefixPlan(embeddings=embeddings))


def _n_virtual(context: ReadContext) -> int:
    if context.config.integer("num_transformer_submodules", 1) != 1:
        raise UnsupportedAdapter("prompts of encoder-decoder models cannot be served here")
    n_virtual = context.config.integer("num_virtual_tokens")
    if n_virtual > context.limits.max_virtual_tokens:
        raise LimitExceeded(
            f"{n_virtual} virtual tokens, this server allows {context.limits.max_virtual_tokens}"
        )
    return n_virtual


def _key(context: ReadContext) -> str:
    if _KEY not in context.ledger.names:
        raise AdapterMismatch(f"the file lacks {_KEY}", missing_keys=(_KEY,))
    return _KEY
