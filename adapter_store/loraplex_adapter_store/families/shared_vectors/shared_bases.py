"""VeRA and kin: frozen random bases shared by all modules, trained diagonals per module.

VeRA      ΔW = diag(λ_b) B[:out] diag(λ_d) A[:, :in]
PVeRA     as VeRA, with twice the rows in A and λ_d: the mean, which is served, then the spread
RandLoRA  ΔW = α/r · B_flat A_flat   with  A_flat[ρN+n] = λ[ρ,n] · A[ρ] ⊙ γ[n]   and PEFT's order
          B_flat[:, nr+ρ] = B[:, n, ρ]; transposed when in_features > out_features
          The authors' fork calls the bases randbasis_A and randbasis_B and scales by α/(r √N)

A plan holds views of the bases and the diagonals, never a dense ΔW. The bases must be in the file
(save_projection=True): otherwise PEFT draws them again, in a dtype that depends on the machine.
"""

import hashlib
import math
from functools import partial
from typing import NamedTuple

from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.families.contract import Fold, ReadContext
from loraplex_adapter_store.families.extras import fold_linears
from loraplex_adapter_store.families.module_groups import ModuleGroup
from loraplex_adapter_store.families.scaling import positive_rank
from loraplex_adapter_store.plan import Family, ModulePlan, SharedBasis


class _Bases(NamedTuple):
    a: Tensor
    b: Tensor
    digest: str


def read_vera(context: ReadContext) -> Fold:
    bases = _bases(context, "vera_A", "vera_B", n_dims=2)
    rank = bases.a.shape[0]
    if rank != bases.b.shape[1]:
        raise AdapterMismatch(f"vera_A has rank {rank}, vera_B has rank {bases.b.shape[1]}")

    def fold(group: ModuleGroup) -> ModulePlan:
        return _diagonals(group, bases, group.take("vera_lambda_d", rank), "vera_lambda_b")

    rule, parts = f"none (diagonals only), shared rank {rank}", ("vera_lambda_d", "vera_lambda_b")
    return fold_linears(context, Family.VERA, rule, fold, parts)


def read_pvera(context: ReadContext) -> Fold:
    if context.config.flag("sample_at_inference"):
        raise UnsupportedAdapter(
            "PVeRA with sample_at_inference cannot be served: every answer would be another draw; "
            "set it to false to serve the mean"
        )
    bases = _bases(context, "pvera_A", "pvera_B", n_dims=2)
    rank = bases.b.shape[1]
    if bases.a.shape[0] != 2 * rank:
        raise AdapterMismatch(f"pvera_A has {bases.a.shape[0]} rows, {2 * rank} are needed")
    mean = bases._replace(a=bases.a[:rank].clone())

    def fold(group: ModuleGroup) -> ModulePlan:
        diagonal = group.take("pvera_lambda_d", 2 * rank)[:rank]
        return _diagonals(group, mean, diagonal, "pvera_lambda_b")

    rule = f"none (diagonals only), shared rank {rank}, mean of the posterior"
    return fold_linears(context, Family.PVERA, rule, fold, ("pvera_lambda_d", "pvera_lambda_b"))


def read_randlora(context: ReadContext) -> Fold:
    names = ("randlora_A", "randlora_B")
    is_fork = any(key.endswith("randbasis_A") for key in context.ledger.names)
    bases = _bases(context, *(("randbasis_A", "randbasis_B") if is_fork else names), n_dims=3)
    if bases.a.shape[1] != 1 or bases.a.shape[0] != bases.b.shape[2]:
        raise AdapterMismatch(
            f"randlora bases have shapes {list(bases.a.shape)} and {list(bases.b.shape)}, "
            "[rank, 1, n] and [m, n_blocks, rank] are needed"
        )
    rank = positive_rank(context.config, 32)
    alpha = context.config.number("randlora_alpha", 64 if is_fork else 640)
    flat: dict[tuple[int, int], Tensor] = {}  # (large, n_blocks) → flattened B, one copy each
    fold = partial(_fold_randlora, bases=bases, scale=alpha / rank, flat=flat, is_fork=is_fork)
    rule = f"randlora_alpha/r = {alpha:g}/{rank} = {alpha / rank:g}{' / √N' if is_fork else ''}"
    return fold_linears(context, Family.RANDLORA, rule, fold, ("randlora_lambda", "randlora_gamma"))


def _diagonals(group: ModuleGroup, bases: _Bases, diagonal: Tensor, out_suffix: str) -> ModulePlan:
    _check_size(group.module, bases.a.shape[1], group.in_features)
    _check_size(group.module, bases.b.shape[0], group.out_features)
    out_scale = group.take(out_suffix, group.out_features)
    basis = SharedBasis(
        basis_digest=f"{bases.digest}:{group.in_features}:{group.out_features}",
        a=bases.a[:, : group.in_features],
        b=bases.b[: group.out_features],
        rank_scale=diagonal.unsqueeze(1),
        out_scale=out_scale,
    )
    return ModulePlan(shared=basis)


def _fold_randlora(
    group: ModuleGroup,
    bases: _Bases,
    scale: float,
    flat: dict[tuple[int, int], Tensor],
    is_fork: bool,
) -> ModulePlan:
    small, large = sorted((group.in_features, group.out_features))
    rank = bases.a.shape[0]
    n_blocks = group.shape("randlora_lambda", 2)[1]
    _check_size(group.module, bases.a.shape[2], small)
    _check_size(group.module, bases.b.shape[0], large)
    _check_size(group.module, bases.b.shape[1], n_blocks)
    lambdas = group.take("randlora_lambda", rank, n_blocks)
    gammas = group.take("randlora_gamma", n_blocks, small)
    if (large, n_blocks) not in flat:
        flat[large, n_blocks] = bases.b[:large, :n_blocks].flatten(1)
    basis = SharedBasis(
        basis_digest=f"{bases.digest}:{small}:{large}:{n_blocks}",
        a=bases.a[:, 0, :small],
        b=flat[large, n_blocks],
        rank_scale=lambdas * (scale / math.sqrt(n_blocks) if is_fork else scale),
        block_scale=gammas,
        transposed=group.in_features > group.out_features,
    )
    return ModulePlan(shared=basis)


def _bases(context: ReadContext, a_name: str, b_name: str, *, n_dims: int) -> _Bases:
    """Load the shared pair. Copies that PEFT writes beside modules must be equal to the pair."""
    ledger = context.ledger
    pair: list[Tensor] = []
    digest = hashlib.sha256()
    for name in (a_name, b_name):
        keys = [key for key in ledger.names if key == name or key.endswith(f".{name}")]
        if not keys:
            raise UnsupportedAdapter(
                f"the file lacks the shared basis {name}: save it with save_projection=True, "
                "drawing it again would depend on the machine"
            )
        first = min(keys, key=len)
        pair.append(ledger.take(first, (None,) * n_dims))
        digest.update(ledger.raw(first))
        for key in keys:
            if ledger.raw(key) != ledger.raw(first):
                raise UnsupportedAdapter(f"{key} differs from {first}: bases must be shared")
            ledger.claim(key)
    return _Bases(pair[0], pair[1], digest.hexdigest())


def _check_size(module: str, have: int, need: int) -> None:
    if have < need:
        raise AdapterMismatch(f"{module} needs {need} rows of the shared basis, it has {have}")
