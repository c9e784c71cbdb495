"""Trainable tokens (also canonical-example editing by rows): some embedding rows are replaced."""

from __future__ import annotations

from loraplex_adapter_store.errors import AdapterMismatch
from loraplex_adapter_store.plan import Family

from .contract import Fold, ReadContext
from .extras import fold_with_extras

__all__ = ["read"]


def read(context: ReadContext) -> Fold:
    fold = fold_with_extras(context, Family.TOKENS, "rows replaced, no scale", {})
    if not fold.embedding_rows and not fold.head_rows:
        raise AdapterMismatch(
            "no trained token rows match the base's embedding",
            context.ledger.unclaimed,
            unexpected_keys=context.ledger.unclaimed,
        )
    return fold
