"""Embedding tables of the base, with the adapters' own rows and factors in their rows."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional

from .forward_context import FallbackParts, ForwardContext

__all__ = ["AdaptedEmbedding", "replace_embeddings"]


class AdaptedEmbedding(nn.Module):
    """``scale · weight[ids]``. Call it with one id for each row of the step.

    An adapter's table, low-rank factors and token rows change what the scale multiplies, as in
    PEFT. A tied head has the table too, and is not changed by any of it.
    """

    def __init__(
        self, name: str, weight: Tensor, scale: Tensor | float | None, step: ForwardContext
    ) -> None:
        super().__init__()
        self.weight = weight  # [n_rows, width]
        self._name = name
        self._scale = scale.to(weight.dtype) if isinstance(scale, Tensor) else scale
        self._step = step

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` [..., T] → [..., T, width], a fresh tensor."""
        out = self._scaled(functional.embedding(ids, self.weight))
        for fallback in self._step.fallback:
            if fallback.parts.changes(self._name):
                rows = fallback.rows
                own = self._embed(ids.reshape(-1)[rows], fallback.parts)
                out.view(-1, out.shape[-1])[rows] = self._scaled(own).to(out.dtype)
        return out

    def _scaled(self, embedded: Tensor) -> Tensor:
        return embedded if self._scale is None else embedded * self._scale

    def _embed(self, ids: Tensor, parts: FallbackParts) -> Tensor:
        """[n] → [n, width] of one adapter, before the scale."""
        embedded = functional.embedding(ids, parts.replaced_weights.get(self._name, self.weight))
        module = parts.modules.get(self._name)
        if module is not None and module.a is not None and module.b is not None:
            embedded = embedded + functional.linear(module.a.t()[ids], module.b)
        token_rows = parts.token_rows.get(self._name)
        return embedded if token_rows is None else token_rows.put(ids, embedded)


def replace_embeddings(model: nn.Module, step: ForwardContext) -> frozenset[str]:
    """Replaces the embeddings that are plain tables; returns their names.

    Those that do more than look a row up and scale it stay as they are, and take no adapters.
    """
    tables = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    replaced = set()
    for name, table in tables:
        own = AdaptedEmbedding(name, table.weight, getattr(table, "embed_scale", None), step)
        if _answers_alike(own, table):
            model.set_submodule(name, own)
            replaced.add(name)
    return frozenset(replaced)


@torch.no_grad()
def _answers_alike(own: AdaptedEmbedding, table: nn.Embedding) -> bool:
    if len(inspect.signature(table.forward).parameters) != 1:
        return False  # it computes its ids from more than ids (OPT's positions)
    last = table.num_embeddings - 1
    ids = torch.tensor([[0, last // 2, last]], device=table.weight.device)
    expected, found = table(ids), own(ids)
    return expected.shape == found.shape and bool(torch.equal(found, expected))
