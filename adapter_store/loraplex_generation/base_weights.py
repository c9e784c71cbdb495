"""Where a FrozenBase has its weights: tensors of its own, or others' that are read when used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import safe_open
from torch import Tensor

__all__ = ["BaseWeights", "FileWeights", "FrozenLinear", "HeldLinear", "ReadLinear", "no_rest"]

_PRODUCTS_OF_A_PIECE = 1 << 27  # multiplications: some milliseconds of a core
_LEAST_ROWS = 16  # of a piece, since each reads all weights


def no_rest() -> None:
    """For who computes without a pause."""


class FrozenLinear(Protocol):
    """One or several linears that read the same input; gradients reach the input alone."""

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., Σ out]."""

    def matrix(self) -> Tensor:
        """[Σ out, in]. Not to be written to."""


class BaseWeights(Protocol):
    """By the names of the checkpoint. Raises KeyError for one that it has not."""

    def linear(self, names: Sequence[str]) -> FrozenLinear: ...

    def tied(self, table: Tensor) -> FrozenLinear:
        """The output head that is the table of the embedding."""

    def tensor(self, name: str) -> Tensor: ...


class HeldLinear:
    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = tuple(weights)

    def __call__(self, x: Tensor) -> Tensor:
        parts = [F.linear(x, weight) for weight in self.weights]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def matrix(self) -> Tensor:
        return self.weights[0] if len(self.weights) == 1 else torch.cat(self.weights)


class ReadLinear:
    """Reads its weights, [Σ out, in], anew for each product, forwards and backwards.

    So memory holds those of one linear at a time. ``rest`` is called before each piece of a
    product of at most some milliseconds: the thread may wait there.
    """

    def __init__(self, read: Callable[[], Tensor], rest: Callable[[], None] = no_rest) -> None:
        self._read, self._rest = read, rest

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self._read, self._rest)  # type: ignore[no-untyped-call]
        return product

    def matrix(self) -> Tensor:
        return self._read()


class _Product(torch.autograd.Function):
    """y = x Wᵀ, and back dx = dy W; W takes no gradient and is not kept between the two."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, read: Callable[[], Tensor], rest: Callable[[], None]
    ) -> Tensor:
        ctx.read, ctx.rest = read, rest
        return _in_pieces(F.linear, x, read, rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _in_pieces(torch.matmul, grads[0], ctx.read, ctx.rest), None, None


def _in_pieces(
    product: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    read: Callable[[], Tensor],
    rest: Callable[[], None],
) -> Tensor:
    """``product`` of the rows of ``x`` [..., n] with the weights."""
    rest()
    weights = read()
    rows = x.reshape(-1, x.shape[-1])
    n = max(_LEAST_ROWS, _PRODUCTS_OF_A_PIECE // weights.numel())
    if len(rows) <= n:
        return product(x, weights)
    parts = []
    for part in torch.split(rows, n):
        rest()
        parts.append(product(part, weights))
    return torch.cat(parts).reshape(*x.shape[:-1], -1)


class FileWeights:
    """Those of ``model.safetensors``.

    ``mapped``: weights stored in ``dtype`` stay in the file, so that beside a server of the same
    base they take no memory of their own. A forward takes about a tenth longer.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, *, mapped: bool) -> None:
        self._dtype, self._mapped = dtype, mapped
        with safe_open(directory / "model.safetensors", "pt") as weights:
            self._tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118

    def linear(self, names: Sequence[str]) -> HeldLinear:
        weights = [self.tensor(f"{name}.weight") for name in names]
        return HeldLinear(weights if self._mapped else [torch.cat(weights)])

    def tied(self, table: Tensor) -> HeldLinear:
        return HeldLinear([table])

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._tensors.pop(name)
        return tensor.to(self._dtype).contiguous()
