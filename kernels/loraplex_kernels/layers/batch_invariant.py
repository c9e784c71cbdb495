"""A mode in which matrix products on a GPU give a row the same bits in every batch.

torch sends ``mm`` and similar operators to cuBLAS, whose order of sums depends on the number of
rows. This mode sends all of them to ``matmul_triton``: those of the base, of gates and of adapters'
operators. On a CPU it changes nothing. It costs some microseconds for each operator outside of CUDA
graphs, and nothing inside them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class BatchInvariant(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """A context of the calling thread. torch keeps float64, sparse and complex products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        product = _PRODUCTS.get(func)
        if product is not None and all(_is_ours(x) for x in args if isinstance(x, Tensor)):
            return product(*args, **options)
        if func._can_decompose():  # einsum and matmul arrive whole in inference mode
            with self:
                result = func.decompose(*args, **options)
            if result is not NotImplemented:
                return result
        return func(*args, **options)


def _is_ours(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in _DTYPES and x.layout is torch.strided


def _batched(
    a: Tensor, b: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    from loraplex_kernels.triton.matmul import matmul_triton

    shape = (a.shape[0], a.shape[1], b.shape[2])
    if out is None:
        out = a.new_empty(shape)
    if out.stride(2) == 1 or shape[2] == 1:
        matmul_triton(a, b, bias, out=out)
        return out
    contiguous = a.new_empty(shape)
    matmul_triton(a, b, bias, out=contiguous)
    return out.copy_(contiguous)


def _mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    whole = None if out is None else out.unsqueeze(0)
    return _batched(a.unsqueeze(0), b.unsqueeze(0), out=whole).squeeze(0)


def _addmm(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, **out: Tensor
) -> Tensor:
    if (beta, alpha) == (1, 1) and bias.dim() == 1 and bias.is_contiguous():
        whole = {name: each.unsqueeze(0) for name, each in out.items()}
        return _batched(a.unsqueeze(0), b.unsqueeze(0), bias, **whole).squeeze(0)
    total = beta * bias + alpha * _mm(a, b)
    return out["out"].copy_(total) if out else total


def _baddbmm(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, **out: Tensor
) -> Tensor:
    total = beta * bias + alpha * _batched(a, b)
    return out["out"].copy_(total) if out else total


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = x.reshape(1, -1, x.shape[-1])
    plain = None if bias is None else bias.contiguous()
    return _batched(rows, weight.t().unsqueeze(0), plain).view(*x.shape[:-1], weight.shape[0])


_aten = torch.ops.aten
_PRODUCTS: Mapping[Any, Callable[..., Tensor]] = {
    _aten.mm.default: _mm,
    _aten.mm.out: _mm,
    _aten.addmm.default: _addmm,
    _aten.addmm.out: _addmm,
    _aten.bmm.default: _batched,
    _aten.bmm.out: _batched,
    _aten.baddbmm.default: _baddbmm,
    _aten.baddbmm.out: _baddbmm,
    _aten.linear.default: _linear,
}
