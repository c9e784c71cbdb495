"""The tensors of each module that an adapter targets. All families read their tensors here.

A group holds the tensors of one module in the file, by suffix. The groups returned here

- belong to linears of the base (or to embeddings, for families that read them),
- are exactly the modules that the config targets,
- have every tensor that the method needs.

``ModuleGroup.take`` checks the shape and that all values are finite. ``rank`` checks the rank limit
before a factor is loaded. ``check_fold`` checks the result once more.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, LimitExceeded, UnsupportedAdapter
from loraplex_adapter_store.files.adapter_config import AdapterConfig
from loraplex_adapter_store.files.targets import expand_targets, group_by_module

from .contract import ReadContext

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
    """A module and its tensors. For an embedding ``in_features`` is the number of its rows."""

    module: str  # name in the base
    kind: ModuleKind
    in_features: int
    out_features: int
    keys: Mapping[str, str]  # suffix → tensor name in the file
    context: ReadContext

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.keys

    @property
    def config(self) -> AdapterConfig:
        return self.context.config

    def base_weight(self) -> Tensor:
        """A float32 copy of the base's weight, [out_features, in_features]."""
        return self.context.base.weight(self.module)

    def take(self, suffix: str, *shape: int | None) -> Tensor:
        """Claim and load a tensor, float32 and finite; None in ``shape`` stands for any size.

        Without ``shape``, any shape is accepted. Raises AdapterMismatch or MalformedFile.
        """
        return self.context.ledger.take(self.keys[suffix], shape or None)

    def factors(self, a: str, b: str, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """Claim and load A [rank, in] and B [out, rank]; ``rank`` is A's own if it is None.

        Raises LimitExceeded, AdapterMismatch or MalformedFile.
        """
        stored = self.rank(a)
        rank = stored if rank is None else rank
        return self.take(a, rank, self.in_features), self.take(b, self.out_features, rank)

    def vector(self, suffix: str, length: int) -> Tensor:
        """Load a vector [length] that may be stored as a row or a column."""
        flat = self.take(suffix).flatten()
        if flat.numel() != length:
            raise AdapterMismatch(
                f"tensor {self.keys[suffix]!r} has {flat.numel()} entries, the base needs {length}"
            )
        return flat

    def indices(self, suffix: str, n_values: int, *shape: int | None) -> Tensor:
        """Load integers in [0, n_values), int64."""
        return self.context.ledger.take_indices(self.keys[suffix], shape, n_values)

    def shape(self, suffix: str, n_dims: int) -> tuple[int, ...]:
        """Return the stored shape. Raises AdapterMismatch unless it has ``n_dims`` dimensions."""
        self.context.ledger.expect(self.keys[suffix], (None,) * n_dims)
        return self.context.ledger.shape(self.keys[suffix])

    def rank(self, suffix: str, *, n_dims: int = 2) -> int:
        """Return the first size of a down-projection. Raises LimitExceeded."""
        rank = self.shape(suffix, n_dims)[0]
        self.limit_rank(rank)
        return rank

    def limit_rank(self, rank: int) -> None:
        """See ``limit_rank`` of this file."""
        limit_rank(self.context, self.module, rank)

    def require(self, *suffixes: str) -> None:
        """Raises AdapterMismatch that names the suffixes without a tensor."""
        lost = [f"{self.module}.{suffix}" for suffix in suffixes if suffix not in self]
        if lost:
            raise AdapterMismatch(
                f"{self.module} is incomplete: it lacks {', '.join(lost)}", lost, missing_keys=lost
            )

    def drop(self, suffix: str, why: str) -> None:
        """Account for a tensor that is not needed, and note it in the report."""
        self.context.ledger.claim(self.keys[suffix])
        self.context.notes.append(f"{self.keys[suffix]}: {why}")


def linear_groups(
    context: ReadContext,
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
    *,
    synonyms: Mapping[str, str] | None = None,
) -> Mapping[str, ModuleGroup]:
    """Return module → group of every targeted linear. Refuses a config that targets an embedding.

    Raises AdapterMismatch or UnsupportedAdapter, which name the modules and tensors.
    """
    parts = Parts(required, optional, synonyms or {})
    return module_groups(context, {ModuleKind.LINEAR: parts})


def module_groups(
    context: ReadContext, kinds: Mapping[ModuleKind, Parts]
) -> Mapping[str, ModuleGroup]:
    """Return the groups of a method that adapts exactly these kinds of modules."""
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
    """Return module → suffix → tensor name of exactly the targets, which may be norms.

    Raises AdapterMismatch, see ``check_targets``.
    """
    keys = group_by_module(context.ledger.unclaimed, suffixes, context.base)
    check_targets(context, targets, keys)
    return keys


def module_group(
    context: ReadContext, module: str, keys: Mapping[str, str], parts: Parts
) -> ModuleGroup:
    """Return one checked group, for methods whose keys are not suffixes of module names.

    ``module`` must be a linear or an embedding of the base. Raises AdapterMismatch.
    """
    keys = {parts.synonyms.get(suffix, suffix): key for suffix, key in keys.items()}
    kind = _kind(context, module)
    if kind is ModuleKind.EMBEDDING:
        embedding = context.base.embeddings[module]
        sizes = embedding.n_rows, embedding.width
    else:
        linear = context.base.modules[module]
        sizes = linear.in_features, linear.out_features
    group = ModuleGroup(module, kind, *sizes, keys, context)
    group.require(*parts.required)
    return group


def check_targets(context: ReadContext, targets: Collection[str], modules: Iterable[str]) -> None:
    """Raises AdapterMismatch unless exactly the targets have tensors.

    An adapter that would work only in part is refused. Optional linears of the base may lack
    tensors: the class that the adapter was trained on does not have them.
    """
    present = frozenset(modules)
    wanted = frozenset(targets) - (context.base.optional - present)
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
    """Raises LimitExceeded. Call it before anything of this rank is allocated."""
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
