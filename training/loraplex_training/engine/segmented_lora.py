"""The linears of a frozen base with the LoRAs of several adapters, forward and backward.

    y[t] = g ⊙ (x[t] Wᵀ + scale · (drop(x[t]) Aᵀ) Bᵀ) + b      A, B, g of t's segment

The gain g [out] is DoRA's, 1 for other adapters. Linears that read one input (q, k, v; gate, up)
are one product. The base gets no gradient.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PRODUCTS_OF_A_PIECE = 1 << 29  # multiplications, which take a core some milliseconds
_LEAST_ROWS = 32  # of a piece, because each piece reads all weights


class Dropout(NamedTuple):
    """Dropout on the input of A. The masks follow from the seed, so none is kept."""

    share: float  # of the entries that become zero
    seed: int

    def mask(self, name: str, like: Tensor) -> Tensor:
        """Return the factors of the input ``like`` of a linear: 0 or 1 / (1 − share)."""
        random = torch.Generator(like.device).manual_seed(
            zlib.crc32(f"{self.seed} {name}".encode())
        )
        # Four entries from each number: four times as fast on a CPU as ``bernoulli_``.
        numbers = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
        bits = numbers.random_(-(1 << 63), None, generator=random).view(torch.int16)
        n_dropped = round(self.share * (1 << 16))  # of the values of an entry
        kept = bits[: like.numel()] >= n_dropped - (1 << 15)
        mask = kept.view(torch.uint8).to(like.dtype).div_(1 - self.share)
        return mask.view(like.shape)


class Segment(NamedTuple):
    """The rows [first, end) of an adapter that has LoRA on some linears of a group."""

    first: int
    end: int
    scale: float
    members: tuple[int, ...]  # indices of the adapted linears in the group
    dropout: Dropout | None = None
    has_gains: bool = False


class _Member(NamedTuple):
    """The LoRA of a segment on one linear of a group."""

    rows: slice
    columns: slice  # of the group's outputs
    name: str
    segment: Segment
    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    gain: Tensor | None  # [out]

    def input(self, x: Tensor) -> Tensor:
        """Return the rows that A reads of ``x`` [T, in]."""
        rows, dropout = x[self.rows], self.segment.dropout
        return rows if dropout is None else rows * dropout.mask(self.name, rows)


class GroupedLinear:
    """Frozen linears over one input. ``segments`` and ``factors`` are those of the batch."""

    def __init__(
        self,
        names: Sequence[str],
        out_features: Sequence[int],
        read: Callable[[], Tensor],
        bias: Tensor | None,
        rest: Callable[[], None],
        fast_product: type[torch.autograd.Function] | None = None,
    ) -> None:
        """``read`` returns the weights [Σ out, in]. ``rest`` is called every few milliseconds.

        ``fast_product`` takes the place of ``TorchProduct`` for adapters without dropout and gains.
        """
        self.names, self.out_features = tuple(names), tuple(out_features)
        self.read, self.bias, self.rest = read, bias, rest
        self._fast_product = fast_product
        ends = [sum(out_features[: i + 1]) for i in range(len(out_features))]
        self.parts = [slice(end - n, end) for end, n in zip(ends, out_features, strict=True)]
        self.segments: list[Segment] = []
        self.factors: list[Tensor] = []  # A, B and the gain of each member of each segment
        self._input: Tensor | None = None  # of the outputs that other members will ask for
        self._outputs: list[Tensor | None] = []

    def output(self, index: int, x: Tensor) -> Tensor:
        """Return the output of linear ``index`` for ``x`` [..., in], with all members at once."""
        if self._input is not x or self._outputs[index] is None:
            rows = x.reshape(-1, x.shape[-1])
            y: Tensor = self._function.apply(rows, self, *self.factors)  # type: ignore[no-untyped-call]
            parts = torch.split(y.view(*x.shape[:-1], -1), list(self.out_features), -1)
            self._input, self._outputs = x, list(parts)
        out, self._outputs[index] = self._outputs[index], None
        assert out is not None
        if all(each is None for each in self._outputs):
            self._input = None
        return out

    @property
    def _function(self) -> type[torch.autograd.Function]:
        is_plain = all(each.dropout is None and not each.has_gains for each in self.segments)
        if self._fast_product is not None and self.segments and is_plain:
            return self._fast_product
        return TorchProduct


class LinearOfGroup(nn.Module):
    """The module that stands in the model for one linear of a group."""

    def __init__(self, group: GroupedLinear, index: int) -> None:
        super().__init__()
        self._group, self._index = group, index

    def forward(self, x: Tensor) -> Tensor:
        return self._group.output(self._index, x)


class TorchProduct(torch.autograd.Function):
    """``apply(x, group, *factors)`` returns the outputs [T, Σ out] of all linears of a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: GroupedLinear, *factors: Tensor) -> Tensor:
        y = in_pieces(x, group.read().t(), group.rest)
        narrow = [factor.to(x.dtype) for factor in factors]
        inner, ungained = [], []
        for each in _members(group, group.segments, narrow):
            part = y[each.rows, each.columns]
            inner.append(each.input(x) @ each.a.t())
            part.addmm_(inner[-1], each.b.t(), alpha=each.segment.scale)
            if each.gain is not None:
                ungained.append(part.clone())
                part.mul_(each.gain)
        if group.bias is not None:
            y += group.bias
        ctx.group, ctx.segments, ctx.n_factors = group, group.segments, len(factors)
        ctx.save_for_backward(x, *narrow, *inner, *ungained)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), group = grads, ctx.group
        x, *rest = ctx.saved_tensors
        members = list(_members(group, ctx.segments, rest[: ctx.n_factors]))
        inner, ungained = iter(rest[ctx.n_factors :]), iter(rest[ctx.n_factors + len(members) :])
        gain_grads: list[Tensor] = []
        if any(each.gain is not None for each in members):
            grad = grad.clone()
            for each in members:
                if each.gain is not None:
                    part = grad[each.rows, each.columns]
                    gain_grads.append((part * next(ungained)).sum(0, dtype=torch.float32))
                    part.mul_(each.gain)
        gx: Tensor | None = None
        if ctx.needs_input_grad[0]:  # not below the lowest adapted layer
            gx = in_pieces(grad, group.read(), group.rest)
        of_gains = iter(gain_grads)
        factor_grads: list[Tensor] = []
        for each in members:
            g = grad[each.rows, each.columns]
            gu = (g @ each.b).mul_(each.segment.scale)
            rows, dropout = x[each.rows], each.segment.dropout
            mask = None if dropout is None else dropout.mask(each.name, rows)
            if gx is not None:
                into = gx[each.rows]
                into.addmm_(gu, each.a) if mask is None else into.addcmul_(gu @ each.a, mask)
            rows = rows if mask is None else rows * mask
            factor_grads.append((gu.t() @ rows).float())
            factor_grads.append((g.t() @ next(inner)).float().mul_(each.segment.scale))
            if each.gain is not None:
                factor_grads.append(next(of_gains))
        return gx, None, *factor_grads


def _members(
    group: GroupedLinear, segments: Sequence[Segment], factors: Sequence[Tensor]
) -> Iterator[_Member]:
    """Yield the adapted linears of each segment with their factors."""
    left = iter(factors)
    for segment in segments:
        for i in segment.members:
            rows, name = slice(segment.first, segment.end), group.names[i]
            a, b = next(left), next(left)
            gain = next(left) if segment.has_gains else None
            yield _Member(rows, group.parts[i], name, segment, a, b, gain)


def in_pieces(x: Tensor, weights: Tensor, rest: Callable[[], None]) -> Tensor:
    """Return ``x`` [T, n] times ``weights`` [n, m], in pieces with a rest before each."""
    n = max(_LEAST_ROWS, _PRODUCTS_OF_A_PIECE // weights.numel())
    y = x.new_empty(len(x), weights.shape[1])
    for part, out in zip(torch.split(x, n), torch.split(y, n), strict=True):
        rest()
        torch.mm(part, weights, out=out)
    return y
