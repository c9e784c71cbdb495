"""Trainable tokens (also canonical-example editing by rows): some embedding rows are replaced."""

from __future__ import annotations

from loraplex_adapter_store.errors import AdapterMismatch
from loraplex_adapter_store.plan import Family

from .contract import Fold, ReadContext
from .extras import read_extras

__all__ = ["read"]


def read(context: ReadContext) -> Fold:
    extras = read_extras(context, {})
    if not extras.embedding_rows and not extras.head_rows:
        raise AdapterMismatch(
            "no trained token rows match the base's embedding",
            context.ledger.unclaimed,
            unexpected_keys=context.ledger.unclaimed,
        )
    return Fold(
        family=Family.TOKENS,
        scale_rule="rows replaced, no scale",
        embedding_rows=extras.embedding_rows,
        head_rows=extras.head_rows,
        replaced_weights=extras.replaced_weights,
    )
