"""Norms and embeddings of any transformers model, with adapters that change them.

Rows whose adapter has its own norm (LN tuning, modules_to_save) are normed again with it.
"""

import inspect
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraplex_adapter_store.plan import NormPlan
from loraplex_kernels.layers.model_ops import add_rms_norm, rms_norm

from .forward_context import FallbackParts, ForwardContext


class RmsNorm(nn.Module):
    """``x / rms(x) ⊙ (offset + weight)``, the sum of squares in float32."""

    def __init__(
        self, name: str, weight: Tensor, eps: float, offset: float, step: ForwardContext
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.eps = eps
        self.offset = offset
        self._name = name
        self._step = step

    def forward(self, x: Tensor) -> Tensor:
        """Norm ``x`` [..., width], see ``_by_row``."""
        flat = x.reshape(-1, x.shape[-1])
        out = rms_norm(flat, self.weight, self.eps, offset=self.offset).view(x.shape)
        self._norm_own_rows(x, out)
        return out

    def add_and_norm(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add ``x`` to ``residual`` in place and return the norm of the sum. Both [T, width]."""
        out = add_rms_norm(x, residual, self.weight, self.eps, offset=self.offset)
        self._norm_own_rows(residual, out)
        return out

    @property
    def is_own_anywhere(self) -> bool:
        """Return True if an adapter of the step has its own weight for this norm."""
        return any(self._name in fallback.parts.norms for fallback in self._step.fallback)

    def _norm_own_rows(self, x: Tensor, out: Tensor) -> None:
        for fallback in self._step.fallback:
            own = fallback.parts.norms.get(self._name)
            if own is not None and own.weight is not None:
                rows = _by_row(x, x, self._step)[fallback.rows]
                normed = rms_norm(
                    rows.reshape(-1, rows.shape[-1]), own.weight, self.eps, offset=self.offset
                )
                _by_row(out, x, self._step)[fallback.rows] = normed.view(rows.shape)


class AdaptedNorm(nn.Module):
    """Any other norm of transformers, called again with an adapter's weight and bias."""

    def __init__(self, name: str, norm: nn.Module, step: ForwardContext) -> None:
        super().__init__()
        for part, value in norm.named_parameters(recurse=False):
            self.register_parameter(part, value)  # under the names of the checkpoint
        self._norm = norm
        self._name = name
        self._step = step

    def forward(self, x: Tensor) -> Tensor:
        """Norm ``x`` [..., width], see ``_by_row``."""
        out: Tensor = self._norm(x)
        for fallback in self._step.fallback:
            own = fallback.parts.norms.get(self._name)
            if own is not None:
                rows = _by_row(x, x, self._step)[fallback.rows]
                _by_row(out, x, self._step)[fallback.rows] = self._with(own, rows)
        return out

    def _with(self, own: NormPlan, rows: Tensor) -> Tensor:
        parts = {"weight": own.weight, "bias": own.bias}
        parameters = {part: value for part, value in parts.items() if value is not None}
        normed: Tensor = torch.func.functional_call(self._norm, parameters, (rows,))
        return normed


def replace_norms(
    model: nn.Module, step: ForwardContext, *, within: tuple[str, ...] = ("",)
) -> frozenset[str]:
    """Replace every norm that has parameters, and return their names.

    ``within``: prefixes of the names of modules that are replaced.
    """
    norms = [
        (name, module)
        for name, module in model.named_modules()
        if name.startswith(within) and "Norm" in type(module).__name__
        if any(True for _ in module.parameters(recurse=False))
    ]
    for name, module in norms:
        model.set_submodule(name, _rms_norm(name, module, step) or AdaptedNorm(name, module, step))
    return frozenset(name for name, _ in norms)


def _rms_norm(name: str, module: nn.Module, step: ForwardContext) -> RmsNorm | None:
    """Return None if ``module`` is not an RMSNorm, as random rows show."""
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or eps is None:
        return None
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    norm = RmsNorm(name, weight, float(eps), 1.0 if _adds_one(module, weight) else 0.0, step)
    return norm if _agree(norm, module, weight) else None


@torch.no_grad()
def _agree(ours: RmsNorm, theirs: nn.Module, weight: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, weight.shape[0], generator=generator).to(weight)
    expected, actual = theirs(rows).float(), ours(rows).float()
    rounding = 4 * torch.finfo(weight.dtype).eps
    return bool(((actual - expected).abs() <= rounding * (1 + expected.abs())).all())


@torch.no_grad()
def _adds_one(module: nn.Module, weight: Tensor) -> bool:
    """Run the norm once, and return True if it multiplies by 1 + weight (as Gemma does)."""
    probe = torch.ones(1, weight.shape[0], dtype=weight.dtype, device=weight.device)
    scaled = module(probe).float()
    plain = (weight.float() - scaled[0]).abs().max()
    plus_one = (1.0 + weight.float() - scaled[0]).abs().max()
    return bool(plus_one < plain)


def _by_row(out: Tensor, x: Tensor, step: ForwardContext) -> Tensor:
    """Return a view of ``out``, of the shape of ``x`` [..., width], whose first axis is the rows.

    The rows of a decoder are one axis, before or after the axis of heads. If both have the same
    size, the rows' axis has the larger stride. Those of a tower are all axes but the last.
    """
    n_rows = step.positions.shape[0]
    fitting = [axis for axis in range(x.dim() - 1) if x.shape[axis] == n_rows]
    if not fitting:
        return out.view(n_rows, x.shape[-1])
    return out.movedim(max(fitting, key=x.stride), 0)


class Table(Protocol):
    """Rows of an embedding, plain or packed."""

    dtype: torch.dtype

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return rows ``token_ids`` int64 [T]: a new tensor [T, width]."""

    def matrix(self) -> Tensor:
        """Return all rows [n_rows, width]."""


class PlainTable:
    """A tensor [n_rows, width]."""

    def __init__(self, weight: Tensor) -> None:
        self._weight, self.dtype = weight, weight.dtype

    def embed(self, token_ids: Tensor) -> Tensor:
        return functional.embedding(token_ids, self._weight)

    def matrix(self) -> Tensor:
        return self._weight


class AdaptedEmbedding(nn.Module):
    """``scale · weight[ids]``, called with one id for each row of the step.

    An adapter's table, low-rank factors and token rows apply before the scale, as in PEFT. They do
    not change a tied head.
    """

    def __init__(
        self, name: str, table: Table, scale: Tensor | float | None, step: ForwardContext
    ) -> None:
        super().__init__()
        self._table = table
        self._name = name
        self._scale = scale.to(table.dtype) if isinstance(scale, Tensor) else scale
        self._step = step

    @property
    def weight(self) -> Tensor:
        """The table [n_rows, width]. Do not write to it."""
        return self._table.matrix()

    def forward(self, ids: Tensor) -> Tensor:
        """Map ``ids`` [..., T] to a new tensor [..., T, width]."""
        out = self._scaled(self._rows(ids))
        for fallback in self._step.fallback:
            if fallback.parts.changes(self._name):
                rows = fallback.rows
                own = self._embed(ids.reshape(-1)[rows], fallback.parts)
                out.view(-1, out.shape[-1])[rows] = self._scaled(own).to(out.dtype)
        return out

    def _rows(self, ids: Tensor) -> Tensor:
        return self._table.embed(ids.reshape(-1)).view(*ids.shape, -1)

    def _scaled(self, embedded: Tensor) -> Tensor:
        return embedded if self._scale is None else embedded * self._scale

    def _embed(self, ids: Tensor, parts: FallbackParts) -> Tensor:
        """Return one adapter's embeddings [n, width] before the scale."""
        replaced = parts.replaced_weights.get(self._name)
        embedded = self._rows(ids) if replaced is None else functional.embedding(ids, replaced)
        module = parts.modules.get(self._name)
        if module is not None and module.a is not None and module.b is not None:
            embedded = embedded + functional.linear(module.a.t()[ids], module.b)
        token_rows = parts.token_rows.get(self._name)
        return embedded if token_rows is None else token_rows.put(ids, embedded)


def replace_embeddings(
    model: nn.Module,
    step: ForwardContext,
    table_of: Callable[[nn.Embedding], Table] = lambda embedding: PlainTable(embedding.weight),
    *,
    within: tuple[str, ...] = ("",),
) -> frozenset[str]:
    """Replace the embeddings that are tables, and return their names.

    Others stay as they are and take no adapters. ``table_of`` returns the rows of an embedding.
    ``within``: as of ``replace_norms``.
    """
    tables = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.startswith(within)
    ]
    replaced = set()
    for name, table in tables:
        own = AdaptedEmbedding(name, table_of(table), getattr(table, "embed_scale", None), step)
        if _answers_alike(own, table):
            model.set_submodule(name, own)
            replaced.add(name)
    return frozenset(replaced)


@torch.no_grad()
def _answers_alike(own: AdaptedEmbedding, table: nn.Embedding) -> bool:
    if len(inspect.signature(table.forward).parameters) != 1:
        return False  # it needs more than ids, as OPT's positions do
    last = table.num_embeddings - 1
    ids = torch.tensor([[0, last // 2, last]], device=own.weight.device)
    return bool(torch.equal(table(ids), own(ids)))
