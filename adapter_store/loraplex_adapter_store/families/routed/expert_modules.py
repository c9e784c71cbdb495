"""LoRA on single experts and on routers, as PEFT writes it where they are linears of their own.

In transformers 4 each expert of a MoE base has linears ``experts.{e}.gate_proj``, ``up_proj`` and
``down_proj`` (Mixtral: ``w1``, ``w3``, ``w2``), and the router is a linear. In transformers 5 the
experts are stacked in ``experts.gate_up_proj`` [E, 2·ff, in] and ``experts.down_proj``
[E, out, ff]. The factors of one expert become those of its rows:

    gate_up   A = [A_gate; A_up],  B = diag(B_gate, B_up)
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch
from loraplex_adapter_store.families.contract import ReadContext
from loraplex_adapter_store.families.module_groups import check_targets, limit_rank
from loraplex_adapter_store.families.scaling import lora_scale
from loraplex_adapter_store.files.targets import resolve_module, split_key, targets_among
from loraplex_adapter_store.plan import StackedFactors

_A, _B = "lora_A.weight", "lora_B.weight"
_EXPERT = re.compile(r".*\.experts\.\d+\.(?:gate_proj|up_proj|down_proj|w1|w2|w3)")
_OF_MIXTRAL = re.compile(r".*\.w[123]")
_STACKS = (".experts.gate_up_proj", ".experts.down_proj")


class _Place(NamedTuple):
    """The rows of a base's parameter that were a linear of their own in training."""

    parameter: str
    expert: int  # the matrix in the stack; 0 for a router
    rows: slice
    n_columns: int


class _Factors(NamedTuple):
    place: _Place
    a: Tensor  # [r, in]
    b: Tensor  # [out, r], scale folded in


def read_expert_modules(context: ReadContext) -> dict[str, StackedFactors]:
    """Claim the tensors of single experts and of routers, and return parameter name → change.

    Empty if the file has none. Raises AdapterMismatch unless exactly the targets have tensors.
    """
    of_parameter: dict[str, list[_Factors]] = {}
    for places in (_places_of_experts(context), _places_of_routers(context)):
        stored = _stored_keys(context, places)
        if stored:
            targets = targets_among(context.config, context.base, places)
            check_targets(context, targets, stored)
        for module, keys in stored.items():
            factors = _read(context, module, places[module], keys)
            of_parameter.setdefault(factors.place.parameter, []).append(factors)
    return {name: _stack(context, name, parts) for name, parts in of_parameter.items()}


def _places_of_experts(context: ReadContext) -> dict[str, _Place]:
    """Return the places by the names of the linears, as the file spells them."""
    paths = [path for path, _ in _split_keys(context)]
    spelled = [path for path in paths if _EXPERT.fullmatch(path)]
    if not spelled:
        return {}
    is_mixtral = _OF_MIXTRAL.fullmatch(spelled[0]) is not None
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    places: dict[str, _Place] = {}
    for parameter, shape in context.base.parameters.items():
        if len(shape) != 3 or not parameter.endswith(_STACKS):
            continue
        n_experts, n_rows, n_columns = shape
        leaves = {down: slice(0, n_rows)}
        if parameter.endswith(_STACKS[0]):
            leaves = {gate: slice(0, n_rows // 2), up: slice(n_rows // 2, n_rows)}
        block = _as_spelled(parameter.rpartition(".")[0], spelled[0])
        for index in range(n_experts):
            for leaf, rows in leaves.items():
                places[f"{block}.{index}.{leaf}"] = _Place(parameter, index, rows, n_columns)
    return places


def _places_of_routers(context: ReadContext) -> dict[str, _Place]:
    paths = [path for path, _ in _split_keys(context)]
    example = next(iter(paths), "")
    example = next((path for path in paths if ".block_sparse_moe." in path), example)
    places: dict[str, _Place] = {}
    for router in context.base.routers:
        parameter = f"{router}.weight"
        n_rows, n_columns = context.base.parameters[parameter]
        name = _as_spelled(router, example)
        places[name] = _Place(parameter, 0, slice(0, n_rows), n_columns)
    return places


def _as_spelled(module: str, example: str) -> str:
    """Return the name of a module in transformers 4, whose Mixtral calls the block otherwise."""
    if ".block_sparse_moe." in example:
        return module.replace(".mlp.", ".block_sparse_moe.")
    return module


def _split_keys(context: ReadContext) -> Iterator[tuple[str, str]]:
    for key in context.ledger.unclaimed:
        split = split_key(key, (_A, _B))
        if split is not None:
            yield split[0], key


def _stored_keys(context: ReadContext, places: Mapping[str, _Place]) -> dict[str, dict[str, str]]:
    """Return linear → suffix → key of the unclaimed tensors at ``places``."""
    stored: dict[str, dict[str, str]] = {}
    for path, key in _split_keys(context) if places else ():
        module = resolve_module(path, places)
        if module is not None:
            suffix = _A if split_key(key, (_A,)) else _B
            stored.setdefault(module, {})[suffix] = key
    return stored


def _read(context: ReadContext, module: str, place: _Place, keys: Mapping[str, str]) -> _Factors:
    lost = [f"{module}.{part}" for part in (_A, _B) if part not in keys]
    if lost:
        raise AdapterMismatch(
            f"{module} is incomplete: it lacks {lost[0]}", lost, missing_keys=lost
        )
    rank, scale = lora_scale(context.config, module)
    limit_rank(context, module, rank)
    a = context.ledger.take(keys[_A], (rank, place.n_columns))
    b = context.ledger.take(keys[_B], (place.rows.stop - place.rows.start, rank))
    return _Factors(place, a, b * scale)


def _stack(context: ReadContext, name: str, parts: list[_Factors]) -> StackedFactors:
    """Return one stack, with zeros for experts without factors and for lower ranks."""
    shape = context.base.parameters[name]
    n_experts, n_rows, n_columns = shape if len(shape) == 3 else (1, *shape)
    ranks = [0] * n_experts
    for part in parts:
        ranks[part.place.expert] += part.a.shape[0]
    left = torch.zeros(n_experts, n_rows, max(ranks))
    right = torch.zeros(n_experts, max(ranks), n_columns)
    ends = [0] * n_experts
    for (_, index, rows, _), a, b in parts:
        own = slice(ends[index], ends[index] + a.shape[0])
        left[index, rows, own], right[index, own] = b, a
        ends[index] = own.stop
    return StackedFactors(left, right)
