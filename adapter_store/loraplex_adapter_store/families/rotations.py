"""Orthogonal maps of a linear's input or output.

OFT   y = W R x + b. R: blocks on the diagonal, R_i = (I − Q_i)(I + Q_i)⁻¹ with Q_i skew-symmetric
      (Cayley), or the first terms of its series; with block_share, one block for all
BOFT  R: a product of such matrices between permutations (a butterfly), then y = s ⊙ (W R x) + b
HRA   y = W H x + b,  H = Π_i (I − 2 u_i u_iᵀ),  u_i of length one  (apply_GS: also orthogonal)
      H − I = −2 Σ_i p_i u_iᵀ with p_i = Π_{j<i} (I − 2 u_j u_jᵀ) u_i, so A = Uᵀ, B = −2 W P
ROAD  y = R (W x + b): rotates and scales pairs of outputs. In each group of k outputs, i and
      j = i + k/2 are a pair. Variants 1, 2 and 4 train 1, 2 or 4 angles θ and scales α for a pair
"""

from functools import partial

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, MalformedFile
from loraplex_adapter_store.families.contract import Fold, ReadContext
from loraplex_adapter_store.families.extras import fold_linears
from loraplex_adapter_store.families.module_groups import ModuleGroup
from loraplex_adapter_store.operators.kinds import (
    BlockRotation,
    ButterflyRotation,
    PairRotation,
)
from loraplex_adapter_store.plan import Family, ModulePlan

_OFT = "oft_R.weight"
_VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}  # variant → angles per pair
_MAX_TERMS = 64


def read_oft(context: ReadContext) -> Fold:
    return fold_linears(context, Family.OFT, "none (inputs rotated)", _fold_oft, (_OFT,))


def read_boft(context: ReadContext) -> Fold:
    rule, parts = "outputs scaled as trained", ("boft_R", "boft_s")
    return fold_linears(context, Family.BOFT, rule, _fold_boft, parts)


def _fold_oft(group: ModuleGroup) -> ModulePlan:
    config = group.config
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
    """Return k for k·(k − 1)/2 entries."""
    size = (1 + int((1 + 8 * n_entries) ** 0.5)) // 2
    if size * (size - 1) // 2 != n_entries:
        raise AdapterMismatch(f"{n_entries} entries fill no skew-symmetric matrix")
    return size


def _fold_boft(group: ModuleGroup) -> ModulePlan:
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
    # The plan scales the base's bias, which training did not scale.
    bias = None if base_bias is None else base_bias * (1 - scale)
    return ModulePlan(input_operator=rotation, out_scale=scale, bias=bias)


def _butterfly_order(n_blocks: int, size: int, index: int, n_factors: int) -> Tensor:
    """Return the order of inputs in which factor ``index`` cuts them into blocks.

    In each group of 2^index blocks, half blocks of even index come before those of odd index.
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


def read_hra(context: ReadContext) -> Fold:
    orthogonal = context.config.flag("apply_GS")
    rule = "none (reflections of the input" + (", made orthogonal)" if orthogonal else ")")
    fold = partial(_fold_hra, orthogonal=orthogonal)
    return fold_linears(context, Family.HRA, rule, fold, ("hra_u",))


def _fold_hra(group: ModuleGroup, orthogonal: bool) -> ModulePlan:
    group.limit_rank(group.shape("hra_u", 2)[1])
    u = group.take("hra_u", group.in_features, None)
    if not bool((u.norm(dim=0) > 0).all()):
        raise AdapterMismatch(f"{group.module}: a reflection of length zero has no direction")
    u = _orthogonalised(u) if orthogonal else u / u.norm(dim=0)
    passed = u if orthogonal else _passed_through(u)
    return ModulePlan(a=u.t().contiguous(), b=-2 * (group.base_weight() @ passed))


def _orthogonalised(u: Tensor) -> Tensor:
    """Return the columns [in_features, r] after Gram-Schmidt."""
    columns: list[Tensor] = []
    for column in u.unbind(dim=1):
        for earlier in columns:
            column = column - (earlier @ column) * earlier
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


def _passed_through(u: Tensor) -> Tensor:
    """Return the columns p_i = u_i − 2 Σ_{j<i} p_j (u_j · u_i)."""
    columns: list[Tensor] = []
    for index, column in enumerate(u.unbind(dim=1)):
        if index:
            before = torch.stack(columns, dim=1)
            column = column - 2 * before @ (u[:, :index].t() @ column)
        columns.append(column)
    return torch.stack(columns, dim=1)


def read_road(context: ReadContext) -> Fold:
    variant = context.config.text("variant", "road_1") or ""
    size = context.config.integer("group_size", 64)
    if variant not in _VARIANTS or size < 2 or size % 2:
        raise MalformedFile(
            f"adapter_config.json: ROAD needs a variant of {', '.join(_VARIANTS)} and an even "
            f"group_size, not {variant!r} and {size}"
        )
    rule, parts = f"none ({variant}, groups of {size})", ("road_theta", "road_alpha")
    fold = partial(_fold_road, variant=variant, size=size)
    return fold_linears(context, Family.ROAD, rule, fold, parts)


def _fold_road(group: ModuleGroup, variant: str, size: int) -> ModulePlan:
    if group.out_features % size:
        raise AdapterMismatch(
            f"{group.module}: groups of {size} do not divide {group.out_features} outputs"
        )
    length = _VARIANTS[variant] * group.out_features // 2
    theta, alpha = group.take("road_theta", length), group.take("road_alpha", length)
    if variant == "road_1":  # both outputs of a pair share angle and scale
        theta, alpha = (
            part.view(-1, size // 2).repeat_interleave(2, dim=0).flatten()
            for part in (theta, alpha)
        )
    if variant == "road_4":  # each output has parameters for itself and for the other output
        theta, alpha = theta.view(-1, 2, size), alpha.view(-1, 2, size)
        cos = (alpha[:, 0] * theta[:, 0].cos()).flatten()
        sin = (alpha[:, 1] * theta[:, 1].sin()).flatten()
    else:
        cos, sin = alpha * theta.cos(), alpha * theta.sin()
    return ModulePlan(output_operator=PairRotation(cos - 1, sin, size))


def skew_symmetric(entries: Tensor, size: int) -> Tensor:
    """Fill [n, size, size] from the entries above the diagonal, [n, size·(size − 1)/2]."""
    rows, columns = torch.triu_indices(size, size, 1)
    upper = entries.new_zeros(entries.shape[0], size, size)
    upper[:, rows, columns] = entries
    return upper - upper.transpose(1, 2)


def cayley(skew: Tensor) -> Tensor:
    """Return the orthogonal (I − Q)(I + Q)⁻¹ of each skew-symmetric Q [n, k, k]."""
    eye = torch.eye(skew.shape[-1])
    solved: Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
    return solved


def cayley_series(skew: Tensor, n_terms: int) -> Tensor:
    """Return PEFT's series of n terms, I + 2 Q + … + 2 Qⁿ⁻² + Qⁿ⁻¹; I + 2 Q for two terms."""
    if not 1 <= n_terms <= _MAX_TERMS:
        raise MalformedFile(
            f"adapter_config.json: num_cayley_neumann_terms is {n_terms}, 1 to {_MAX_TERMS} are "
            "possible"
        )
    total = torch.eye(skew.shape[-1]).expand_as(skew)
    if n_terms > 1:
        total = total + 2 * skew
    if n_terms > 2:
        power = skew @ skew
        total = total + 2 * power
        for _ in range(3, n_terms - 1):
            power = power @ skew
            total = total + 2 * power
        total = total + power @ skew
    return total
