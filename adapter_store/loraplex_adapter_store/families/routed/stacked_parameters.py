"""LoRA on the stacked experts and the router of a MoE base.

PEFT's ``target_parameters`` names parameters that stack one matrix for each expert, and the weight
of the router, whose tensors are those of a linear:

ΔW_e = s · B_e A_e for W [E, out, in]. A is stored as [E·r, in], B as [out, r·E] with the expert as
the fastest index. Bases that store W as [E, in, out] get A_eᵀ B_eᵀ. PEFT nests several parameters
of one module: the tensors of the last are at the module, those of each earlier one behind one more
``base_layer``. For tensors of single experts see ``expert_modules``.
"""

from collections.abc import Iterable, Mapping

from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.families.contract import ReadContext
from loraplex_adapter_store.families.module_groups import limit_rank
from loraplex_adapter_store.families.scaling import lora_scale
from loraplex_adapter_store.files.targets import module_names, resolve_module, split_key
from loraplex_adapter_store.plan import StackedFactors

from .expert_modules import read_expert_modules

_A, _B = "lora_A.weight", "lora_B.weight"
_NESTED = ".base_layer"
_TRANSPOSED = ("gpt_oss",)  # bases that store experts as [E, in, out]; needed if in = out

Place = tuple[str, int]  # module, nesting depth


def read_stacked(context: ReadContext) -> Mapping[str, StackedFactors]:
    """Claim the tensors and return parameter name → change. Empty if none is targeted."""
    stored = _stored_keys(context)
    read: dict[str, StackedFactors] = {}
    for module, parameters in _targets(context).items():
        for index, parameter in enumerate(parameters):
            keys = stored.get((module, len(parameters) - 1 - index), {})
            read[parameter] = _factors(context, parameter, keys)
    modules = read_expert_modules(context)
    both = sorted(read.keys() & modules.keys())
    if both:
        raise AdapterMismatch(f"{both[0]} has tensors of the stack and of single experts", both)
    read |= modules
    if read and context.config.flag("use_dora"):
        raise UnsupportedAdapter(
            f"DoRA on {next(iter(read))}: only plain LoRA changes the experts and routers of a "
            "base; leave them out of its targets"
        )
    if read:
        n_products = sum(f.left.numel() * f.right.shape[2] for f in read.values())
        context.notes.append(
            f"{len(read)} tensors of experts and routers are changed for its own rows in torch: "
            f"each step with such rows takes {2 * n_products / 1e6:,.0f} MFLOP to form them"
        )
    return read


def _targets(context: ReadContext) -> dict[str, list[str]]:
    """Return module → targeted parameters, in the base's order."""
    wanted = context.config.name_list("target_parameters")
    targets: dict[str, list[str]] = {}
    for name, shape in context.base.parameters.items():
        if not _is_named(name, wanted):
            continue
        module = name.rpartition(".")[0]
        if len(shape) != 3 and not (len(shape) == 2 and module in context.base.routers):
            raise UnsupportedAdapter(
                f"target_parameters names {name} of shape {list(shape)}: only stacked experts and "
                "routers can be targeted by name; name its module in target_modules"
            )
        targets.setdefault(module, []).append(name)
    lost = [one for one in wanted if not any(_is_named(p, (one,)) for p in context.base.parameters)]
    if lost:
        raise AdapterMismatch(
            f"target_parameters names {', '.join(lost)}, which this base does not have", lost
        )
    return targets


def _is_named(name: str, wanted: Iterable[str]) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def _stored_keys(context: ReadContext) -> dict[Place, dict[str, str]]:
    names = module_names(context.base)
    stored: dict[Place, dict[str, str]] = {}
    for key in context.ledger.names:
        split = split_key(key, (_A, _B))
        if split is None:
            continue
        path, depth = split[0], 0
        while path.endswith(_NESTED):
            path, depth = path.removesuffix(_NESTED), depth + 1
        module = resolve_module(path, names)
        if module is not None:
            stored.setdefault((module, depth), {})[split[1]] = key
    return stored


def _factors(context: ReadContext, parameter: str, keys: Mapping[str, str]) -> StackedFactors:
    lost = [f"{parameter}: {part}" for part in (_A, _B) if part not in keys]
    if lost:
        raise AdapterMismatch(f"{parameter} has no tensors in the file", lost, missing_keys=lost)
    ledger = context.ledger
    shape = context.base.parameters[parameter]
    n_experts, n_rows, n_columns = shape if len(shape) == 3 else (1, *shape)
    rank, scale = lora_scale(context.config, parameter)
    limit_rank(context, parameter, rank)
    is_transposed = len(shape) == 3 and (
        ledger.shape(keys[_A])[-1] != n_columns
        or (n_rows == n_columns and context.base.model_type in _TRANSPOSED)
    )
    n_out, n_in = (n_columns, n_rows) if is_transposed else (n_rows, n_columns)
    a = ledger.take(keys[_A], (n_experts * rank, n_in)).view(n_experts, rank, n_in)
    b = ledger.take(keys[_B], (n_out, rank * n_experts)).view(n_out, rank, n_experts)
    b = b.permute(2, 0, 1) * scale  # [E, out, r]
    if is_transposed:
        return StackedFactors(a.transpose(1, 2).contiguous(), b.transpose(1, 2).contiguous())
    return StackedFactors(b.contiguous(), a)
