"""The linears of a frozen base with the LoRAs of several adapters, forward and backward.

    y[t] = x[t] Wᵀ + b + scale · (x[t] Aᵀ) Bᵀ        A, B of the adapter whose segment holds t

Linears that read one input (q, k, v; gate, up) are one product. The base gets no gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PRODUCTS_OF_A_PIECE = 1 << 28  # multiplications, which take a core some milliseconds
_LEAST_ROWS = 32  # of a piece, because each piece reads all weights


class Segment(NamedTuple):
    """The rows [first, end) of an adapter that has LoRA on some linears of a group."""

    first: int
    end: int
    scale: float
    members: tuple[int, ...]  # indices of the adapted linears in the group


class GroupedLinear:
    """Frozen linears over one input. ``segments`` and ``factors`` are those of the batch."""

    def __init__(
        self,
        names: Sequence[str],
        out_features: Sequence[int],
        read: Callable[[], Tensor],
        bias: Tensor | None,
        rest: Callable[[], None],
    ) -> None:
        """``read`` returns the weights [Σ out, in]. ``rest`` is called every few milliseconds."""
        self.names, self.out_features = tuple(names), tuple(out_features)
        self.read, self.bias, self.rest = read, bias, rest
        ends = [sum(out_features[: i + 1]) for i in range(len(out_features))]
        self.parts = [slice(end - n, end) for end, n in zip(ends, out_features, strict=True)]
        self.segments: list[Segment] = []
        self.factors: list[Tensor] = []  # A and B of each member of each segment
        self._input: Tensor | None = None  # of the outputs that other members will ask for
        self._outputs: list[Tensor | None] = []

    def output(self, index: int, x: Tensor) -> Tensor:
        """Return the output of linear ``index`` for ``x`` [..., in], with all members at once."""
        if self._input is not x or self._outputs[index] is None:
            rows = x.reshape(-1, x.shape[-1])
            y: Tensor = _Product.apply(rows, self, *self.factors)  # type: ignore[no-untyped-call]
            parts = torch.split(y.view(*x.shape[:-1], -1), list(self.out_features), -1)
            self._input, self._outputs = x, list(parts)
        out, self._outputs[index] = self._outputs[index], None
        assert out is not None
        if all(each is None for each in self._outputs):
            self._input = None
        return out


class LinearOfGroup(nn.Module):
    """The module that stands in the model for one linear of a group."""

    def __init__(self, group: GroupedLinear, index: int) -> None:
        super().__init__()
        self._group, self._index = group, index

    def forward(self, x: Tensor) -> Tensor:
        return self._group.output(self._index, x)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: GroupedLinear, *factors: Tensor) -> Tensor:
        y = in_pieces(lambda rows, w: rows @ w.t(), x, group.read, group.rest)
        if group.bias is not None:
            y += group.bias
        narrow = [factor.to(x.dtype) for factor in factors]
        inner, pairs = [], _pairs(group.segments, narrow)
        for segment, members in pairs:
            rows, out = x[segment.first : segment.end], y[segment.first : segment.end]
            for member, a, b in members:
                u = rows @ a.t()
                part = out[:, group.parts[member]]
                part.addmm_(u, b.t(), alpha=segment.scale)
                inner.append(u)
        ctx.group, ctx.segments = group, group.segments
        ctx.save_for_backward(x, *narrow, *inner)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), group = grads, ctx.group
        x, *rest = ctx.saved_tensors
        n = 2 * len(rest) // 3
        narrow, inner = rest[:n], iter(rest[n:])
        gx = in_pieces(torch.matmul, grad, group.read, group.rest)
        factor_grads: list[Tensor] = []
        for segment, members in _pairs(ctx.segments, narrow):
            rows = x[segment.first : segment.end]
            out, into = grad[segment.first : segment.end], gx[segment.first : segment.end]
            for member, a, b in members:
                g = out[:, group.parts[member]]
                gu = (g @ b).mul_(segment.scale)
                into.addmm_(gu, a)
                factor_grads.append((gu.t() @ rows).float())
                factor_grads.append((g.t() @ next(inner)).float().mul_(segment.scale))
        return gx, None, *factor_grads


def _pairs(
    segments: Sequence[Segment], factors: Sequence[Tensor]
) -> list[tuple[Segment, list[tuple[int, Tensor, Tensor]]]]:
    """Return each segment with (member, A, B) of its adapted linears."""
    left = iter(factors)
    return [(s, [(member, next(left), next(left)) for member in s.members]) for s in segments]


def in_pieces(
    product: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    read: Callable[[], Tensor],
    rest: Callable[[], None],
) -> Tensor:
    """Return ``product`` of the rows of ``x`` [T, n] with the weights, in ``x``'s dtype."""
    rest()
    weights = read().to(x.dtype)
    n = max(_LEAST_ROWS, _PRODUCTS_OF_A_PIECE // weights.numel())
    if len(x) <= n:
        return product(x, weights)
    parts = []
    for part in torch.split(x, n):
        rest()
        parts.append(product(part, weights))
    return torch.cat(parts)
