"""The tensors of each module that an adapter targets: the one way a family reads them.

A group is what the file holds for one module, as suffix → tensor. The groups returned here

- belong to linears of the base (or to embeddings, where the family says that it reads them),
- are exactly the modules that the config targets,
- have every tensor that the method needs.

``ModuleGroup.take`` checks the shape and that all values are finite, ``rank`` the rank limit before
a factor is loaded. ``fold_check`` looks at the result once more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, LimitExceeded, UnsupportedAdapter
from loraplex_adapter_store.targets import expand_targets
from loraplex_adapter_store.tensor_names import group_by_module

from .contract import ReadContext

__all__ = [
    "ModuleGroup",
    "ModuleKind",
    "Parts",
    "check_targets",
    "limit_rank",
    "linear_groups",
    "module_group",
    "module_groups",
    "module_keys",
]

_SHOWN_TENSORS = 3


class ModuleKind(Enum):
    LINEAR = "linear"
    EMBEDDING = "embedding"


class Parts(NamedTuple):
    """The tensors of one kind of module, by suffix, as "lora_A.weight"."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = {}  # other spellings → suffix


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """One module and its tensors. For an embedding ``in_features`` is the number of its rows."""

    module: str  # name in the base
    kind: ModuleKind
    in_features: int
    out_features: int
    keys: Mapping[str, str]  # suffix → tensor name in the file
    context: ReadContext

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.keys

    def take(self, suffix: str, *shape: int | None) -> Tensor:
        """Claims and loads a tensor, float32 and finite; None in ``shape`` stands for any size.

        Without a shape any is accepted. Raises AdapterMismatch or MalformedFile.
        """
        return self.context.ledger.take(self.keys[suffix], shape or None)

    def vector(self, suffix: str, length: int) -> Tensor:
        """``take`` of a vector that may be stored as a row or a column. Returns [length]."""
        flat = self.take(suffix).flatten()
        if flat.numel() != length:
            raise AdapterMismatch(
                f"tensor {self.keys[suffix]!r} has {flat.numel()} entries, the base needs {length}"
            )
        return flat

    def indices(self, suffix: str, n_values: int, *shape: int | None) -> Tensor:
        """``take`` of integers in [0, n_values), int64."""
        return self.context.ledger.take_indices(self.keys[suffix], shape, n_values)

    def shape(self, suffix: str, n_dims: int) -> tuple[int, ...]:
        """The shape as stored. Raises AdapterMismatch unless it has ``n_dims`` dimensions."""
        self.context.ledger.expect(self.keys[suffix], (None,) * n_dims)
        return self.context.ledger.shape(self.keys[suffix])

    def rank(self, suffix: str, *, n_dims: int = 2) -> int:
        """The first size of a down-projection. Raises LimitExceeded above the server's limit."""
        rank = self.shape(suffix, n_dims)[0]
        limit_rank(self.context, self.module, rank)
        return rank

    def drop(self, suffix: str, why: str) -> None:
        """Accounts for a tensor that is not needed, and says so in the report."""
        self.context.ledger.claim(self.keys[suffix])
        self.context.notes.append(f"{self.keys[suffix]}: {why}")


def linear_groups(
    context: ReadContext,
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
    *,
    synonyms: Mapping[str, str] | None = None,
) -> Mapping[str, ModuleGroup]:
    """module → group of every targeted linear. A config that targets an embedding is refused.

    Raises AdapterMismatch or UnsupportedAdapter; both name the modules and tensors.
    """
    parts = Parts(required, optional, synonyms or {})
    return module_groups(context, {ModuleKind.LINEAR: parts})


def module_groups(
    context: ReadContext, kinds: Mapping[ModuleKind, Parts]
) -> Mapping[str, ModuleGroup]:
    """As ``linear_groups``, for a method that adapts the kinds of modules named, no others."""
    targets = expand_targets(context.config, context.base)
    _refuse_other_kinds(context, targets, kinds)
    suffixes = [
        suffix
        for parts in kinds.values()
        for suffix in (*parts.required, *parts.optional, *parts.synonyms)
    ]
    return {
        module: module_group(context, module, keys, kinds[_kind(context, module)])
        for module, keys in module_keys(context, targets, suffixes).items()
    }


def module_keys(
    context: ReadContext, targets: Collection[str], suffixes: Iterable[str]
) -> Mapping[str, Mapping[str, str]]:
    """module → suffix → tensor name of exactly the targets, norms or whatever they are.

    Raises AdapterMismatch, see ``check_targets``.
    """
    found = group_by_module(context.ledger.unclaimed, suffixes, context.base)
    check_targets(context, targets, found)
    return found


def module_group(
    context: ReadContext, module: str, keys: Mapping[str, str], parts: Parts
) -> ModuleGroup:
    """One checked group, for methods whose keys are no suffixes of module names.

    ``module`` must be a linear or an embedding of the base. Raises AdapterMismatch for lost parts.
    """
    keys = {parts.synonyms.get(suffix, suffix): key for suffix, key in keys.items()}
    lost = [f"{module}.{suffix}" for suffix in parts.required if suffix not in keys]
    if lost:
        raise AdapterMismatch(
            f"{module} is incomplete: it lacks {', '.join(lost)}", lost, missing_keys=lost
        )
    kind = _kind(context, module)
    if kind is ModuleKind.EMBEDDING:
        embedding = context.base.embeddings[module]
        return ModuleGroup(module, kind, embedding.n_rows, embedding.width, keys, context)
    linear = context.base.modules[module]
    return ModuleGroup(module, kind, linear.in_features, linear.out_features, keys, context)


def check_targets(context: ReadContext, targets: Collection[str], found: Iterable[str]) -> None:
    """Raises AdapterMismatch unless exactly the targets have tensors.

    An adapter of which only a part would work is refused.
    """
    wanted, present = frozenset(targets), frozenset(found)
    if not wanted and not present:
        raise AdapterMismatch(
            "no module of the base matches target_modules "
            f"{context.config.get('target_modules')!r}: the adapter would do nothing",
            _some_tensors(context),
            unexpected_keys=context.ledger.unclaimed,
        )
    lost, extra = sorted(wanted - present), sorted(present - wanted)
    if lost or extra:
        problems = [f"{name}: targeted by the config, has no tensors" for name in lost]
        problems += [f"{name}: has tensors, is not targeted by the config" for name in extra]
        raise AdapterMismatch(
            f"config and tensors disagree on {len(problems)} of {len(wanted | present)} modules",
            [*problems, *_some_tensors(context)],
            unexpected_keys=context.ledger.unclaimed,
            missing_keys=lost,
        )


def limit_rank(context: ReadContext, module: str, rank: int) -> None:
    """Raises LimitExceeded, before anything of that rank is allocated."""
    if rank > context.limits.max_rank:
        raise LimitExceeded(
            f"{module} has rank {rank}, this server allows {context.limits.max_rank}"
        )


def _refuse_other_kinds(
    context: ReadContext, targets: Iterable[str], kinds: Mapping[ModuleKind, Parts]
) -> None:
    wrong = sorted(module for module in targets if _kind(context, module) not in kinds)
    if wrong:
        allowed = " and ".join(f"{kind.value}s" for kind in kinds)
        raise UnsupportedAdapter(
            f"{context.config.peft_type} adapts {allowed} only, its config targets "
            f"{', '.join(wrong[:_SHOWN_TENSORS])}; leave them out of target_modules",
            [f"{module}: {_kind(context, module).value}" for module in wrong],
        )


def _kind(context: ReadContext, module: str) -> ModuleKind:
    return ModuleKind.LINEAR if module in context.base.modules else ModuleKind.EMBEDDING


def _some_tensors(context: ReadContext) -> list[str]:
    return [f"{name}: tensor in the file" for name in context.ledger.unclaimed[:_SHOWN_TENSORS]]
