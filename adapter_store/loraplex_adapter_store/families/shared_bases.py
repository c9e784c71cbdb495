"""VeRA and RandLoRA: frozen random bases shared by all modules, trained diagonals per module.

VeRA      ΔW = diag(λ_b) B[:out] diag(λ_d) A[:, :in]
RandLoRA  ΔW = α/r · B_flat A_flat   with  A_flat[ρN+n] = λ[ρ,n] · A[ρ] ⊙ γ[n]   and PEFT's order
          B_flat[:, nr+ρ] = B[:, n, ρ]; transposed when in_features > out_features

Never a dense ΔW: the plan holds views of the bases and the diagonals. The bases must be in the file
(save_projection=True): PEFT redraws them otherwise, in a dtype that depends on the machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.plan import Family, ModulePlan, SharedBasis
from loraplex_adapter_store.tensor_names import group_by_module

from .contract import Fold, ReadContext
from .coverage import check_coverage, require_parts
from .extras import read_extras

__all__ = ["read_randlora", "read_vera"]


def read_vera(context: ReadContext) -> Fold:
    a, b, digest = _bases(context, "vera_A", "vera_B")
    names = ("vera_lambda_d", "vera_lambda_b")
    grouped = group_by_module(context.ledger.names, names, context.base)
    check_coverage(context, grouped)
    modules = {
        module: _vera_module(context, module, parts, a, b, digest)
        for module, parts in grouped.items()
    }
    extras = read_extras(context, modules)
    rule = f"none (diagonals only), shared rank {a.shape[0]}"
    return Fold(Family.VERA, rule, modules=extras.modules, replaced_weights=extras.replaced_weights)


def read_randlora(context: ReadContext) -> Fold:
    a, b, digest = _bases(context, "randlora_A", "randlora_B")
    if a.dim() != 3 or b.dim() != 3 or a.shape[1] != 1:
        raise AdapterMismatch(f"randlora bases have shapes {list(a.shape)} and {list(b.shape)}")
    rank, alpha = context.config.integer("r", 32), context.config.number("randlora_alpha", 640)
    names = ("randlora_lambda", "randlora_gamma")
    grouped = group_by_module(context.ledger.names, names, context.base)
    check_coverage(context, grouped)
    flat: dict[tuple[int, int], Tensor] = {}  # (large, n_blocks) → flattened B, one copy each
    modules = {
        module: _randlora_module(context, module, parts, a, b, digest, alpha / rank, flat)
        for module, parts in grouped.items()
    }
    extras = read_extras(context, modules)
    rule = f"randlora_alpha/r = {alpha:g}/{rank} = {alpha / rank:g}"
    return Fold(
        Family.RANDLORA, rule, modules=extras.modules, replaced_weights=extras.replaced_weights
    )


def _vera_module(
    context: ReadContext, module: str, parts: Mapping[str, str], a: Tensor, b: Tensor, digest: str
) -> ModulePlan:
    require_parts(module, parts, ("vera_lambda_d", "vera_lambda_b"))
    shape = context.base.modules[module]
    _check_size(module, a.shape[1], shape.in_features)
    _check_size(module, b.shape[0], shape.out_features)
    diagonal = context.ledger.take(parts["vera_lambda_d"], (a.shape[0],))
    out_scale = context.ledger.take(parts["vera_lambda_b"], (shape.out_features,))
    basis = SharedBasis(
        basis_digest=f"{digest}:{shape.in_features}:{shape.out_features}",
        a=a[:, : shape.in_features],
        b=b[: shape.out_features],
        rank_scale=diagonal.unsqueeze(1),
        out_scale=out_scale,
    )
    return ModulePlan(shared=basis)


def _randlora_module(
    context: ReadContext,
    module: str,
    parts: Mapping[str, str],
    a: Tensor,
    b: Tensor,
    digest: str,
    scale: float,
    flat: dict[tuple[int, int], Tensor],
) -> ModulePlan:
    require_parts(module, parts, ("randlora_lambda", "randlora_gamma"))
    shape = context.base.modules[module]
    small, large = sorted((shape.in_features, shape.out_features))
    n_blocks = context.ledger.shape(parts["randlora_lambda"])[-1]
    _check_size(module, a.shape[2], small)
    _check_size(module, b.shape[0], large)
    _check_size(module, b.shape[1], n_blocks)
    lambdas = context.ledger.take(parts["randlora_lambda"], (a.shape[0], n_blocks))
    gammas = context.ledger.take(parts["randlora_gamma"], (n_blocks, small))
    if (large, n_blocks) not in flat:
        flat[large, n_blocks] = b[:large, :n_blocks].flatten(1)
    basis = SharedBasis(
        basis_digest=f"{digest}:{small}:{large}:{n_blocks}",
        a=a[:, 0, :small],
        b=flat[large, n_blocks],
        rank_scale=lambdas * scale,
        block_scale=gammas,
        transposed=shape.in_features > shape.out_features,
    )
    return ModulePlan(shared=basis)


def _bases(context: ReadContext, a_name: str, b_name: str) -> tuple[Tensor, Tensor, str]:
    """The shared pair; copies that PEFT writes beside every module must be equal to it."""
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
        pair.append(ledger.take(first))
        digest.update(ledger.raw(first))
        for key in keys:
            if ledger.raw(key) != ledger.raw(first):
                raise UnsupportedAdapter(f"{key} differs from {first}: bases must be shared")
            ledger.claim(key)
    return pair[0], pair[1], digest.hexdigest()


def _check_size(module: str, have: int, need: int) -> None:
    if have < need:
        raise AdapterMismatch(f"{module} needs {need} rows of the shared basis, it has {have}")
