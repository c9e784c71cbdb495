"""Methods that train some entries of the weight, or of its spectrum.

SHiRA        y = W x + Σ v[i] at (row, column)[i]; the file holds the positions
SuperTuning  as SHiRA, at the largest (or smallest) weights of the base, with a LoRA beside it
FourierFT    ΔW = s · Re(ifft2(S)), S zero except n entries at positions drawn from a seed
C3A          ΔW of circulant blocks of b × b, each from a kernel of b numbers, over in_features
WaveFT       ΔW = s · idwt2(C), C zero except n coefficients at positions drawn from a seed

WaveFT is one level of the inverse transform. [L H] is the low- and high-pass synthesis of a side:

    idwt2(C) = [L H] [[cA, cV], [cH, cD]] [L H]ᵀ,   C = [[cA, cH], [cV, cD]]

Without ``use_idwt`` the coefficients are entries of ΔW. With short filters ΔW is mostly zero and is
kept as single entries, otherwise as a full matrix.
"""

import json
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.families.contract import Fold, ReadContext
from loraplex_adapter_store.families.extras import fold_linears
from loraplex_adapter_store.families.module_groups import ModuleGroup
from loraplex_adapter_store.operators.kinds import Circulant, DenseDelta, FourierDelta, SparseDelta
from loraplex_adapter_store.plan import Family, ModulePlan

_PLACES_NOTE = "the places of the spectrum are drawn from random_loc_seed, as PEFT does"
_VALUES, _INDICES = "supertuning_values", "supertuning_indices"
_LORA_A, _LORA_B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"
_FILTERS = Path(__file__).with_name("wavelet_filters.json")
_DENSE_SHARE = 0.25  # share of non-zero entries above which a full matrix is faster


def read_fourierft(context: ReadContext) -> Fold:
    scale = context.config.number("scaling", 150.0)
    context.notes.append(_PLACES_NOTE)
    rule, fold = f"scaling = {scale:g}", partial(_fold_fourier, scale=scale)
    return fold_linears(context, Family.FOURIERFT, rule, fold, ("fourierft_spectrum",))


def read_c3a(context: ReadContext) -> Fold:
    context.config.get("init_weights")  # the start of the kernels does not change the base
    return fold_linears(context, Family.C3A, "1/in_features", _fold_c3a, ("c3a_kernel",))


def _drawn_places(group: ModuleGroup, n_entries: int, seed: int) -> Tensor:
    """Return the rows and columns that PEFT draws for a spectrum, int64 [2, n_entries].

    Raises AdapterMismatch if the module has fewer entries.
    """
    n_places = group.out_features * group.in_features
    if n_entries > n_places:
        raise AdapterMismatch(
            f"{group.module}: a spectrum of {n_entries} entries, the weight has {n_places}"
        )
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm(n_places, generator=generator)[:n_entries]
    return torch.stack([flat // group.in_features, flat % group.in_features])


def _fold_fourier(group: ModuleGroup, scale: float) -> ModulePlan:
    spectrum = group.take("fourierft_spectrum", None)
    seed = group.config.integer("random_loc_seed", 777)
    places = _drawn_places(group, spectrum.numel(), seed)
    delta = FourierDelta(places.int(), spectrum * scale, group.out_features)
    return ModulePlan(delta_operator=delta)


def _fold_c3a(group: ModuleGroup) -> ModulePlan:
    n_out, n_in, size = group.shape("c3a_kernel", 3)
    if (n_out * size, n_in * size) != (group.out_features, group.in_features):
        raise AdapterMismatch(
            f"{group.module}: {n_out} × {n_in} blocks of {size} do not make "
            f"[{group.out_features}, {group.in_features}]"
        )
    kernel = group.take("c3a_kernel", n_out, n_in, size)
    return ModulePlan(delta_operator=Circulant(kernel / group.in_features))


def read_shira(context: ReadContext) -> Fold:
    parts = ("shira_weight", "shira_indices")
    return fold_linears(context, Family.SHIRA, "none (entries added)", _fold_shira, parts)


def read_supertuning(context: ReadContext) -> Fold:
    config = context.config
    parts: tuple[str, ...] = (_VALUES,)
    if config.flag("save_precomputed_indices", True):
        parts += (_INDICES,)
    if config.is_set("r"):
        parts += (_LORA_A, _LORA_B)
    rule = "none (entries added)"
    return fold_linears(context, Family.SUPERTUNING, rule, _fold_supertuning, parts)


def _sparse_delta(flat: Tensor, values: Tensor, in_features: int, out_features: int) -> SparseDelta:
    """Build ΔW from values at row · in_features + column, in any order. Duplicates are added."""
    places, inverse = torch.unique(flat, return_inverse=True)
    summed = values.new_zeros(places.numel()).index_add_(0, inverse, values)
    rows_columns = torch.stack([places // in_features, places % in_features])
    return SparseDelta(rows_columns.int(), summed, out_features)


def _fold_shira(group: ModuleGroup) -> ModulePlan:
    values = group.take("shira_weight", None)
    larger = max(group.in_features, group.out_features)
    rows, columns = group.indices("shira_indices", larger, 2, values.numel())
    for axis, indices, size in (
        ("row", rows, group.out_features),
        ("column", columns, group.in_features),
    ):
        if indices.numel() and int(indices.max()) >= size:
            raise AdapterMismatch(
                f"{group.module}: an entry in {axis} {int(indices.max())}, the weight has {size}"
            )
    flat = rows * group.in_features + columns
    delta = _sparse_delta(flat, values, group.in_features, group.out_features)
    return ModulePlan(delta_operator=delta)


def _fold_supertuning(group: ModuleGroup) -> ModulePlan:
    config = group.config
    largest = config.flag("select_top", True)
    values = group.take(_VALUES, None)
    n_places = group.in_features * group.out_features
    if values.numel() > n_places:
        raise AdapterMismatch(f"{group.module}: {values.numel()} entries for {n_places} positions")
    if _INDICES in group:
        flat = group.indices(_INDICES, n_places, values.numel())
    else:
        scores = group.base_weight().abs().flatten()
        flat = scores.topk(values.numel(), largest=largest).indices
    delta = _sparse_delta(flat, values, group.in_features, group.out_features)
    if _LORA_A not in group:
        return ModulePlan(delta_operator=delta)
    a, b = group.factors(_LORA_A, _LORA_B)
    scale = config.number("lora_alpha") / a.shape[0]
    return ModulePlan(a=a, b=b * scale, delta_operator=delta)


def read_waveft(context: ReadContext) -> Fold:
    config = context.config
    scale, name = config.number("scaling", 25.0), config.text("wavelet_family", "db1") or ""
    has_transform = config.flag("use_idwt", True)
    filters = _filters()
    taps = filters.get("db1" if name == "haar" else name)
    if has_transform and taps is None:
        raise UnsupportedAdapter(
            f"WaveFT with wavelet_family {name!r} cannot be served: PEFT has no filters of this "
            f"family; known: {', '.join(filters)}"
        )
    context.notes.append(_PLACES_NOTE)
    rule = f"scaling = {scale:g}, {name if has_transform else 'no wavelet'}"
    fold = partial(_fold_waveft, scale=scale, taps=taps if has_transform else None)
    return fold_linears(context, Family.WAVEFT, rule, fold, ("waveft_spectrum",))


def _fold_waveft(group: ModuleGroup, scale: float, taps: list[float] | None) -> ModulePlan:
    spectrum = group.take("waveft_spectrum", None) * scale
    seed = group.config.integer("random_loc_seed", 777)
    rows, columns = _drawn_places(group, spectrum.numel(), seed)
    if taps is None:
        flat = rows * group.in_features + columns
        delta = _sparse_delta(flat, spectrum, group.in_features, group.out_features)
        return ModulePlan(delta_operator=delta)
    padding = len(taps) - 2
    n_rows, n_columns = _even(group.out_features + padding), _even(group.in_features + padding)
    row_offset = (n_rows - group.out_features) // 2
    column_offset = (n_columns - group.in_features) // 2
    coefficients = torch.zeros(n_rows, n_columns)
    coefficients[rows + row_offset, columns + column_offset] = spectrum
    weight = _inverse_transform(coefficients, torch.tensor(taps))
    return ModulePlan(delta_operator=_smallest(weight[: group.out_features, : group.in_features]))


@cache
def _filters() -> Mapping[str, list[float]]:
    """Return the low-pass reconstruction filters of orthogonal wavelets, as in PEFT.

    Daubechies db1 (Haar) to db10, symlets sym2 to sym10, coiflets coif1 to coif4.
    """
    filters: dict[str, list[float]] = json.loads(_FILTERS.read_text())
    return filters


def _even(size: int) -> int:
    return size + size % 2


def _inverse_transform(coefficients: Tensor, taps: Tensor) -> Tensor:
    n_rows, n_columns = (size // 2 for size in coefficients.shape)
    turned = coefficients.clone()
    turned[:n_rows, n_columns:] = coefficients[n_rows:, :n_columns]
    turned[n_rows:, :n_columns] = coefficients[:n_rows, n_columns:]
    return _synthesis(n_rows, taps) @ turned @ _synthesis(n_columns, taps).t()


def _synthesis(n_coefficients: int, taps: Tensor) -> Tensor:
    """Return [L H], [n_values, 2·n_coefficients]; coefficient i acts on the values from 2·i on."""
    length = taps.numel()
    high = taps.flip(0) * torch.tensor([1.0, -1.0]).repeat(length // 2)
    full = torch.zeros(2 * (n_coefficients - 1) + length, 2 * n_coefficients)
    for index in range(n_coefficients):
        full[2 * index : 2 * index + length, index] = taps
        full[2 * index : 2 * index + length, n_coefficients + index] = high
    margin = length - 2
    return full[margin : full.shape[0] - margin]


def _smallest(weight: Tensor) -> SparseDelta | DenseDelta:
    places = weight.nonzero()
    if places.shape[0] > _DENSE_SHARE * weight.numel():
        return DenseDelta(weight.contiguous())
    return SparseDelta(places.t().int().contiguous(), weight[tuple(places.t())], weight.shape[0])
