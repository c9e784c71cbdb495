"""Trainable tokens (also canonical-example editing by rows): some embedding rows are replaced."""

from __future__ import annotations

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.plan import Family
from loraplex_adapter_store.targets import expand_targets

from .contract import Fold, ReadContext
from .extras import fold_with_extras

__all__ = ["read"]


def read(context: ReadContext) -> Fold:
    elsewhere = sorted(expand_targets(context.config, context.base) - _tables(context.base))
    if elsewhere:
        raise UnsupportedAdapter(
            f"trainable tokens on {', '.join(elsewhere)}: only embedding and head have token rows"
        )
    fold = fold_with_extras(context, Family.TOKENS, "rows replaced, no scale", {})
    if not fold.embedding_rows and not fold.head_rows:
        raise AdapterMismatch(
            "the file lacks trainable_tokens_delta of the base's embedding",
            context.ledger.unclaimed,
            unexpected_keys=context.ledger.unclaimed,
            missing_keys=(f"{context.base.input_embedding}.trainable_tokens_delta",),
        )
    return fold


def _tables(base: BaseSpec) -> frozenset[str]:
    return frozenset({base.input_embedding, base.output_head})
