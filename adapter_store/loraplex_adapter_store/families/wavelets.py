"""WaveFT: ΔW = s · idwt2(C), C zero but for n coefficients at places drawn from a seed.

One level of the inverse transform, of [L H] the low- and high-pass synthesis of a side:

    idwt2(C) = [L H] [[cA, cV], [cH, cD]] [L H]ᵀ,   C = [[cA, cH], [cV, cD]]

Without ``use_idwt`` the coefficients are entries of ΔW themselves. What comes out is mostly zero
for short filters and is kept as single entries then, else as a full matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_adapter_store.errors import UnsupportedAdapter
from loraplex_adapter_store.operators.deltas import DenseDelta, SparseDelta
from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, linear_groups
from .sparse import sparse_delta
from .spectra import drawn_places
from .wavelet_filters import WAVELETS

__all__ = ["read"]

_DENSE_SHARE = 0.25  # of entries that are not zero, from which a full matrix is quicker


def read(context: ReadContext) -> Fold:
    config = context.config
    scale, name = config.number("scaling", 25.0), config.text("wavelet_family", "db1") or ""
    has_transform = config.flag("use_idwt", True)
    taps = WAVELETS.get("db1" if name == "haar" else name)
    if has_transform and taps is None:
        raise UnsupportedAdapter(
            f"WaveFT with wavelet_family {name!r} cannot be served: PEFT has no filters of it that "
            f"it could apply either; known: {', '.join(WAVELETS)}"
        )
    groups = linear_groups(context, ("waveft_spectrum",))
    modules = {
        module: _module(group, scale, taps if has_transform else None)
        for module, group in groups.items()
    }
    context.notes.append("the places of the spectrum are drawn from random_loc_seed, as PEFT does")
    rule = f"scaling = {scale:g}, {name if has_transform else 'no wavelet'}"
    return fold_with_extras(context, Family.WAVEFT, rule, modules)


def _module(group: ModuleGroup, scale: float, taps: tuple[float, ...] | None) -> ModulePlan:
    spectrum = group.take("waveft_spectrum", None) * scale
    seed = group.context.config.integer("random_loc_seed", 777)
    rows, columns = drawn_places(group, spectrum.numel(), seed)
    if taps is None:
        flat = rows * group.in_features + columns
        delta = sparse_delta(flat, spectrum, group.in_features, group.out_features)
        return ModulePlan(delta_operator=delta)
    padding = len(taps) - 2
    shape = [_even(size + padding) for size in (group.out_features, group.in_features)]
    row_offset, column_offset = (
        (padded - size) // 2
        for padded, size in zip(shape, (group.out_features, group.in_features), strict=True)
    )
    coefficients = torch.zeros(shape)
    coefficients[rows + row_offset, columns + column_offset] = spectrum
    weight = _inverse_transform(coefficients, torch.tensor(taps))
    return ModulePlan(delta_operator=_kept(weight[: group.out_features, : group.in_features]))


def _even(size: int) -> int:
    return size + size % 2


def _inverse_transform(coefficients: Tensor, taps: Tensor) -> Tensor:
    n_rows, n_columns = (size // 2 for size in coefficients.shape)
    turned = coefficients.clone()
    turned[:n_rows, n_columns:] = coefficients[n_rows:, :n_columns]
    turned[n_rows:, :n_columns] = coefficients[:n_rows, n_columns:]
    return _synthesis(n_rows, taps) @ turned @ _synthesis(n_columns, taps).t()


def _synthesis(n_coefficients: int, taps: Tensor) -> Tensor:
    """[L H]: [n_values, 2·n_coefficients]; coefficient i spreads over the values from 2·i on."""
    length = taps.numel()
    high = taps.flip(0) * torch.tensor([1.0, -1.0]).repeat(length // 2)
    full = torch.zeros(2 * (n_coefficients - 1) + length, 2 * n_coefficients)
    for index in range(n_coefficients):
        full[2 * index : 2 * index + length, index] = taps
        full[2 * index : 2 * index + length, n_coefficients + index] = high
    margin = length - 2
    return full[margin : full.shape[0] - margin]


def _kept(weight: Tensor) -> SparseDelta | DenseDelta:
    places = weight.nonzero()
    if places.shape[0] > _DENSE_SHARE * weight.numel():
        return DenseDelta(weight.contiguous())
    return SparseDelta(places.t().int().contiguous(), weight[tuple(places.t())], weight.shape[0])
