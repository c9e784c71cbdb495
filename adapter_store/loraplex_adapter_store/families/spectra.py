"""Updates trained as spectra.

FourierFT  ΔW = s · Re(ifft2(S)), S zero but for n entries at places drawn from a seed
C3A        ΔW of circulant blocks of b × b, each one kernel of b numbers, divided by in_features
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch
from loraplex_adapter_store.operators.deltas import Circulant, FourierDelta
from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, linear_groups

__all__ = ["drawn_places", "read_c3a", "read_fourierft"]


def read_fourierft(context: ReadContext) -> Fold:
    scale = context.config.number("scaling", 150.0)
    groups = linear_groups(context, ("fourierft_spectrum",))
    modules = {module: _fourier_module(group, scale) for module, group in groups.items()}
    context.notes.append("the places of the spectrum are drawn from random_loc_seed, as PEFT does")
    return fold_with_extras(context, Family.FOURIERFT, f"scaling = {scale:g}", modules)


def read_c3a(context: ReadContext) -> Fold:
    context.config.get("init_weights")  # how kernels start changes nothing of the base
    groups = linear_groups(context, ("c3a_kernel",))
    modules = {module: _c3a_module(group) for module, group in groups.items()}
    return fold_with_extras(context, Family.C3A, "1/in_features", modules)


def drawn_places(group: ModuleGroup, n_entries: int, seed: int) -> Tensor:
    """int64 [2, n_entries]: rows and columns that PEFT draws for a spectrum of the module's shape.

    Raises AdapterMismatch if the module has fewer places.
    """
    n_places = group.out_features * group.in_features
    if n_entries > n_places:
        raise AdapterMismatch(
            f"{group.module}: a spectrum of {n_entries} entries, the weight has {n_places}"
        )
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm(n_places, generator=generator)[:n_entries]
    return torch.stack([flat // group.in_features, flat % group.in_features])


def _fourier_module(group: ModuleGroup, scale: float) -> ModulePlan:
    spectrum = group.take("fourierft_spectrum", None)
    seed = group.context.config.integer("random_loc_seed", 777)
    places = drawn_places(group, spectrum.numel(), seed)
    delta = FourierDelta(places.int(), spectrum * scale, group.out_features)
    return ModulePlan(delta_operator=delta)


def _c3a_module(group: ModuleGroup) -> ModulePlan:
    n_out, n_in, size = group.shape("c3a_kernel", 3)
    if (n_out * size, n_in * size) != (group.out_features, group.in_features):
        raise AdapterMismatch(
            f"{group.module}: {n_out} × {n_in} blocks of {size} do not make "
            f"[{group.out_features}, {group.in_features}]"
        )
    kernel = group.take("c3a_kernel", n_out, n_in, size)
    return ModulePlan(delta_operator=Circulant(kernel / group.in_features))
