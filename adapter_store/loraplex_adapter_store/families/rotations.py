"""The input of a linear passes an orthogonal matrix: y = W R x + b.

OFT   R: blocks on the diagonal, R_i = (I − Q_i)(I + Q_i)⁻¹ with Q_i skew-symmetric (Cayley), or the
      first terms of its series; one block for all with block_share
BOFT  R: a product of such matrices between permutations (a butterfly), then y = s ⊙ (W R x) + b
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch
from loraplex_adapter_store.operators.rotations import BlockRotation, ButterflyRotation
from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, linear_groups
from .orthogonal import cayley, cayley_series, skew_symmetric

__all__ = ["read_boft", "read_oft"]

_OFT = "oft_R.weight"


def read_oft(context: ReadContext) -> Fold:
    groups = linear_groups(context, (_OFT,))
    modules = {module: _oft_module(group) for module, group in groups.items()}
    return fold_with_extras(context, Family.OFT, "none (inputs rotated)", modules)


def read_boft(context: ReadContext) -> Fold:
    groups = linear_groups(context, ("boft_R", "boft_s"))
    modules = {module: _boft_module(group) for module, group in groups.items()}
    return fold_with_extras(context, Family.BOFT, "outputs scaled as trained", modules)


def _oft_module(group: ModuleGroup) -> ModulePlan:
    config = group.context.config
    longest, n_terms = config.number("eps", 6e-5), config.integer("num_cayley_neumann_terms", 5)
    n_blocks, n_entries = group.shape(_OFT, 2)
    shared = config.flag("block_share")
    size = _block_size(n_entries)
    if size * (1 if shared else n_blocks) > group.in_features or group.in_features % size:
        raise AdapterMismatch(
            f"{group.module}: {n_blocks} blocks of {size} do not tile {group.in_features} inputs"
        )
    entries = group.take(_OFT, 1 if shared else group.in_features // size, n_entries)
    skew = skew_symmetric(entries, size)
    if config.flag("coft"):
        limit = longest / n_blocks**0.5
        norms = skew.norm(dim=(1, 2), keepdim=True)
        skew = torch.where(norms <= limit, skew, limit * skew / norms)
    if config.flag("use_cayley_neumann", True):
        blocks = cayley_series(skew, n_terms)
    else:
        blocks = cayley(skew)
    return ModulePlan(input_operator=BlockRotation(blocks - torch.eye(size)))


def _block_size(n_entries: int) -> int:
    """k of k·(k − 1)/2 entries."""
    size = (1 + int((1 + 8 * n_entries) ** 0.5)) // 2
    if size * (size - 1) // 2 != n_entries:
        raise AdapterMismatch(f"{n_entries} entries fill no skew-symmetric matrix")
    return size


def _boft_module(group: ModuleGroup) -> ModulePlan:
    n_factors, n_blocks, size, _ = group.shape("boft_R", 4)
    if n_factors < 1 or n_blocks * size != group.in_features:
        raise AdapterMismatch(
            f"{group.module}: {n_blocks} blocks of {size} do not make {group.in_features} inputs"
        )
    stored = group.take("boft_R", n_factors, n_blocks, size, size).flatten(0, 1)
    blocks = cayley((stored - stored.transpose(1, 2)) / 2)
    orders = [_butterfly_order(n_blocks, size, index, n_factors) for index in range(n_factors)]
    changes = (blocks - torch.eye(size)).view(n_factors, n_blocks, size, size)
    rotation = ButterflyRotation(changes, torch.stack(orders).int())
    scale = group.vector("boft_s", group.out_features)
    base_bias = group.context.base.bias(group.module)
    kept = None if base_bias is None else base_bias * (1 - scale)  # the bias is not scaled
    return ModulePlan(input_operator=rotation, out_scale=scale, bias=kept)


def _butterfly_order(n_blocks: int, size: int, index: int, n_factors: int) -> Tensor:
    """The inputs in the order in which factor ``index`` cuts them into blocks.

    Within each group of 2^index blocks, half blocks of even index come before those of odd index.
    """
    n_inputs = n_blocks * size
    half, group = size // 2, size << index
    if n_factors == 1:
        return torch.arange(n_inputs)
    if size % 2 or n_blocks % (1 << index) or half == 0:
        raise AdapterMismatch(f"{n_blocks} blocks of {size} make no butterfly of {n_factors}")
    halves = torch.arange(n_inputs).view(-1, group // half, half)
    order = torch.cat([halves[:, 0::2], halves[:, 1::2]], dim=1).flatten()
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(n_inputs)
    return inverse
