"""Methods that train inside the singular value decomposition W = U diag(σ) V of the base weight.

PSOFT  ΔW = U_r diag(σ_r) (R − I) V_r            R orthogonal, with two magnitudes
OSF    ΔW = U diag(σ) V (trained) − U₀ diag(σ₀) V₀ (as the base has them), of the lowest values

The file does not hold the decomposition. It is computed again from this base, as PEFT does at load.
OSF depends only on the product, PSOFT also on the signs that LAPACK picks.
"""

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, MalformedFile
from loraplex_adapter_store.families.contract import Fold, ReadContext
from loraplex_adapter_store.families.extras import fold_linears
from loraplex_adapter_store.families.module_groups import ModuleGroup
from loraplex_adapter_store.families.rotations import cayley, cayley_series, skew_symmetric
from loraplex_adapter_store.files.adapter_config import AdapterConfig
from loraplex_adapter_store.operators.kinds import DenseDelta
from loraplex_adapter_store.plan import Family, ModulePlan

_R, _BEFORE, _AFTER = "psoft_R.weight", "psoft_R.vector_b", "psoft_R.vector_a"
_U, _S, _V = (f"osf_svd_params.{part}_low" for part in "USV")


def read_psoft(context: ReadContext) -> Fold:
    config = context.config
    parts = (
        _R,
        *((_BEFORE,) if config.flag("psoft_mag_b", True) else ()),
        *((_AFTER,) if config.flag("psoft_mag_a", True) else ()),
    )
    context.notes.append(
        "the singular vectors were computed from this base on this machine, as PEFT does at load"
    )
    return fold_linears(context, Family.PSOFT, "none (alpha/r cancels)", _fold_psoft, parts)


def read_osf(context: ReadContext) -> Fold:
    rule = "none (singular values trained)"
    return fold_linears(context, Family.OSF, rule, _fold_osf, (_U, _S, _V))


def _fold_psoft(group: ModuleGroup) -> ModulePlan:
    config = group.config
    rank = config.integer("r", 32)
    group.limit_rank(rank)
    if not 1 <= rank <= min(group.in_features, group.out_features):
        raise AdapterMismatch(f"{group.module}: rank {rank} exceeds its smaller side")
    rotation = _rotation(group, config, rank)
    if _BEFORE in group:
        rotation = group.take(_BEFORE, rank).unsqueeze(1) * rotation
    if _AFTER in group:
        rotation = rotation * group.take(_AFTER, rank)
    u, sigma, v = _leading(group.base_weight(), config, rank)
    change = rotation - torch.eye(rank)
    if config.text("ab_svd_init", "psoft_init") == "pissa_init":
        root = sigma.sqrt()
        return ModulePlan(a=root.unsqueeze(1) * v, b=(u * root) @ change)
    return ModulePlan(a=v, b=(u * sigma) @ change)


def _rotation(group: ModuleGroup, config: AdapterConfig, rank: int) -> Tensor:
    n_terms = config.integer("num_cayley_neumann_terms", 5)
    if not config.flag("psoft_orth", True):
        return group.take(_R, rank, rank)
    entries = group.take(_R, rank * (rank - 1) // 2)
    skew = skew_symmetric(entries.unsqueeze(0), rank)
    if not config.flag("use_cayley_neumann", False):
        return cayley(-skew)[0]
    longest = config.get("cayley_neumann_eps")
    if longest is not None:
        norm = skew.norm()
        limit = config.number("cayley_neumann_eps")
        skew = skew * (limit / (norm + 1e-12)) if norm > limit else skew
    return cayley_series(skew, n_terms)[0]


def _leading(weight: Tensor, config: AdapterConfig, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``rank`` largest singular triplets: [out, r], [r], [r, in]."""
    method = config.text("psoft_svd", "full")
    n_passes = config.integer("psoft_svd_lowrank_niter", 10)
    if method == "full":
        u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], sigma[:rank], v[:rank].clone()
    if method != "lowrank":
        raise MalformedFile(
            f"adapter_config.json: psoft_svd is {method!r}, 'full' or 'lowrank' is needed"
        )
    return _random_triplets(weight, rank, n_passes, config.integer("random_seed", 0))


def _random_triplets(
    weight: Tensor, rank: int, n_passes: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.svd_lowrank`` with its own random generator instead of the process's."""
    is_wide = weight.shape[0] < weight.shape[1]
    matrix = weight.t() if is_wide else weight
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], rank, generator=generator)
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(n_passes):
        basis = torch.linalg.qr(matrix.t() @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    u, sigma, v = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    u, right = basis @ u, v
    if is_wide:
        return right.t(), sigma, u.t().contiguous()
    return u, sigma, right


def _fold_osf(group: ModuleGroup) -> ModulePlan:
    n_low = group.shape(_S, 1)[0]
    smaller = min(group.in_features, group.out_features)
    if n_low > smaller:
        raise AdapterMismatch(f"{group.module}: {n_low} singular values, it has {smaller}")
    trained = group.take(_U, group.out_features, n_low) * group.take(_S, n_low)
    rows = group.take(_V, n_low, group.in_features)
    u, sigma, v = torch.linalg.svd(group.base_weight(), full_matrices=False)
    first = smaller - n_low
    own = u[:, first:] * sigma[first:]
    a, b = torch.cat([rows, v[first:]]), torch.cat([trained, -own], dim=1)
    n_entries = group.in_features * group.out_features
    if 2 * n_low > group.context.limits.max_rank or a.numel() + b.numel() > n_entries:
        return ModulePlan(delta_operator=DenseDelta(b @ a))
    return ModulePlan(a=a, b=b)
