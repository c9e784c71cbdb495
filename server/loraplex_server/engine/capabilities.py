"""What the engine can apply. A plan with any other part is refused before anybody can ask for it.

A plan is a tree of dataclasses. Each of their fields has a row here, which says on what it may
stand; a field or a class without a row is unknown to the engine, and so is the adapter that has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import NoReturn

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import LimitExceeded, UnsupportedAdapter
from loraplex_adapter_store.operators.contract import Operator
from loraplex_adapter_store.operators.deltas import (
    Circulant,
    DenseDelta,
    FourierDelta,
    Kronecker,
    MaskedWeight,
    SparseDelta,
    SumDelta,
)
from loraplex_adapter_store.operators.rotations import (
    BlockRotation,
    ButterflyRotation,
    PairRotation,
)
from loraplex_adapter_store.operators.table import operator_name
from loraplex_adapter_store.plan import (
    AdapterPlan,
    ExpertPlan,
    HeadPlan,
    HeadTask,
    ModulePlan,
    NormPlan,
    PoolingMode,
    PoolingPlan,
    PrefixPlan,
    RoutingStrategy,
    SharedBasis,
    StackedFactors,
)
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.targets import routable_modules
from loraplex_server.model.tensor_parallel import ShardLayout

from .parallel.plan_cut import uncut_parts

__all__ = ["APPLIED_FIELDS", "APPLIED_OPERATORS", "EngineCapabilities"]

_DESCRIPTION = frozenset(
    {"digest", "family", "chat_template", "n_bytes", "packed_adapter", "pooling"}
)
_OPERATOR_FIELDS = frozenset({"input_operator", "delta_operator", "output_operator"})
_LINEAR_PARTS = _OPERATOR_FIELDS | {"a", "b", "out_scale", "bias", "in_scale", "shared"}
_EMBEDDING_PARTS = frozenset({"a", "b"})
_EXPERT_PARTS = frozenset({"a", "b", "out_scale", "bias"})

# Every field of a plan that the engine knows, by class. Those of a module depend on what it is.
APPLIED_FIELDS: Mapping[type, frozenset[str]] = {
    AdapterPlan: _DESCRIPTION
    | {"modules", "experts", "prefix", "embedding_rows", "head_rows", "replaced_weights", "norms"}
    | {"stacked", "head"},
    ModulePlan: _LINEAR_PARTS,
    SharedBasis: frozenset(
        {"basis_digest", "a", "b", "rank_scale", "block_scale", "out_scale", "transposed"}
    ),
    NormPlan: frozenset({"weight", "bias"}),
    HeadPlan: frozenset({"task", "weight", "bias", "labels", "activation"}),
    PoolingPlan: frozenset({"mode", "normalize"}),
    ExpertPlan: frozenset({"gate", "strategy", "top_k", "top_p", "experts"}),
    PrefixPlan: frozenset({"keys", "values", "embeddings"}),
    StackedFactors: frozenset({"left", "right"}),
}
# Operators that are exact in the engine's dtype, on rows of any number.
_DELTAS = (Circulant, DenseDelta, FourierDelta, Kronecker, MaskedWeight, SparseDelta, SumDelta)
_MAPS = (BlockRotation, ButterflyRotation, PairRotation)
APPLIED_OPERATORS: frozenset[type[Operator]] = frozenset((*_DELTAS, *_MAPS))
_STRATEGIES = frozenset(RoutingStrategy)
_TASKS = frozenset({HeadTask.SEQ_CLS, HeadTask.TOKEN_CLS})
_POOLING_MODES = frozenset(PoolingMode)


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """The modules of one base and what an adapter may change on each. Names are the base's own."""

    linears: frozenset[str]
    embeddings: frozenset[str]
    norms: frozenset[str]
    stacked: frozenset[str]  # parameters that stack experts
    routable: frozenset[str]  # the MLP blocks and projections that may have experts
    input_embedding: str
    output_head: str
    n_layers: int
    max_rank: int | None = None  # None: any that fits the device pool
    layout: ShardLayout | None = None  # of a base that is cut over several processes

    @staticmethod
    def of(spec: BaseSpec, *, max_rank: int | None = None) -> EngineCapabilities:
        """As ``of_model``, by the base's names alone, where no engine runs."""
        return EngineCapabilities(
            linears=frozenset(spec.modules),
            embeddings=frozenset(spec.embeddings),
            norms=_norms_of(spec),
            stacked=frozenset(n for n, shape in spec.parameters.items() if len(shape) == 3),
            routable=routable_modules(spec.model_type, spec.modules) - {spec.output_head},
            input_embedding=spec.input_embedding,
            output_head=spec.output_head,
            n_layers=spec.n_layers,
            max_rank=max_rank,
        )

    @staticmethod
    def of_model(
        model: BaseModel, *, max_rank: int | None = None, layout: ShardLayout | None = None
    ) -> EngineCapabilities:
        """Of an engine that runs this model: what was replaced in it can be adapted."""
        of_base = EngineCapabilities.of(model.spec, max_rank=max_rank)
        linears = (name for group in model.groups.values() for name in group.module_names)
        return replace(
            of_base,
            linears=frozenset(linears),
            embeddings=model.embeddings,
            norms=model.norms,
            stacked=model.stacked,
            routable=model.routable,
            layout=layout,
        )

    def check(self, plan: AdapterPlan) -> None:
        """Raises UnsupportedAdapter with every part that nothing applies, LimitExceeded for ranks.

        Looks at names and shapes only: microseconds a module. Any thread.
        """
        problems = list(self._problems(plan))
        if problems:
            raise UnsupportedAdapter(
                f"adapter {plan.digest[:12]} has parts that this engine does not apply", problems
            )
        self._check_rank(plan)

    def _check_rank(self, plan: AdapterPlan) -> None:
        limit = self.max_rank
        if limit is None:
            return
        for name, module in _low_rank_modules(plan):
            if module.rank > limit:
                _refuse_rank(plan, name, module.rank, limit)

    def _problems(self, plan: AdapterPlan) -> Iterator[str]:
        yield from _unknown_fields("", plan, APPLIED_FIELDS[AdapterPlan])
        for name, module in plan.modules.items():
            yield from self._module_problems(name, module)
        for name, experts in plan.experts.items():
            yield from self._expert_problems(name, experts, plan)
        yield from self._prefix_problems(plan)
        for rows, part, place in (
            (plan.embedding_rows, "embedding_rows", self.input_embedding),
            (plan.head_rows, "head_rows", self.output_head),
        ):
            if rows and place not in self.embeddings and place not in self.linears:
                yield f"{part}: {place or 'no module'} of this base cannot take them"
            if rows and place in plan.modules:
                yield f"{part}: rows and factors on {place}"
        for name in plan.replaced_weights:
            if name not in self.linears and name not in self.embeddings:
                yield f"{name}.weight: no linear and no embedding of this base"
        for name, factors in plan.stacked.items():
            if name not in self.stacked:
                yield f"{name}: no tensor of stacked experts that this engine can change"
            yield from _unknown_fields(name, factors, APPLIED_FIELDS[StackedFactors])
        for name, norm in plan.norms.items():
            if name not in self.norms:
                yield f"{name}: no norm of this base"
            yield from _unknown_fields(name, norm, APPLIED_FIELDS[NormPlan])
        yield from _vector_problems(plan.head, plan.pooling)
        if self.layout is not None:
            yield from uncut_parts(plan, self.layout)

    def _module_problems(self, name: str, module: ModulePlan) -> Iterator[str]:
        if name in self.linears:
            yield from _unknown_fields(name, module, _LINEAR_PARTS)
        elif name in self.embeddings:
            yield from _unknown_fields(name, module, _EMBEDDING_PARTS)
        else:
            yield f"{name}: no linear and no embedding of this base"
        if module.shared is not None:
            yield from _unknown_fields(f"{name}.shared", module.shared, APPLIED_FIELDS[SharedBasis])
        for part in _OPERATOR_FIELDS:
            operator = getattr(module, part)
            inner = operator.parts if isinstance(operator, SumDelta) else (operator,)
            for one in inner:
                if one is not None and type(one) not in APPLIED_OPERATORS:
                    yield f"{name}.{part}: {operator_name(one)}"

    def _expert_problems(self, place: str, plan: ExpertPlan, whole: AdapterPlan) -> Iterator[str]:
        if place not in self.routable:
            yield f"{place}: no gated MLP or linear to route to experts"
        yield from _unknown_fields(place, plan, APPLIED_FIELDS[ExpertPlan])
        if plan.strategy not in _STRATEGIES:
            yield f"{place}: routing by {plan.strategy!r}"
        for index, expert in enumerate(plan.experts):
            for name, module in expert.items():
                if name != place and name.rpartition(".")[0] != place:
                    yield f"{name}: behind the gate of {place}, which does not contain it"
                if name in whole.modules:
                    yield f"{name}: experts and plain factors on one module"
                yield from _unknown_fields(f"{name} of expert {index}", module, _EXPERT_PARTS)

    def _prefix_problems(self, plan: AdapterPlan) -> Iterator[str]:
        prefix = plan.prefix
        if prefix is None:
            return
        yield from _unknown_fields("prefix", prefix, APPLIED_FIELDS[PrefixPlan])
        if prefix.keys and len(prefix.keys) != self.n_layers:
            yield f"prefix.keys: {len(prefix.keys)} layers, this base has {self.n_layers}"


def _vector_problems(head: HeadPlan | None, pooling: PoolingPlan | None) -> Iterator[str]:
    """Of what ``engine.pooling`` reads from hidden states."""
    if head is not None:
        yield from _unknown_fields("head", head, APPLIED_FIELDS[HeadPlan])
        if head.task not in _TASKS:
            yield f"head: task {head.task!r}"
    if pooling is not None:
        yield from _unknown_fields("pooling", pooling, APPLIED_FIELDS[PoolingPlan])
        if pooling.mode not in _POOLING_MODES:
            yield f"pooling: {pooling.mode!r}"


def _norms_of(spec: BaseSpec) -> frozenset[str]:
    """What has a vector for a weight and is neither a linear nor an embedding."""
    names = {
        name.removesuffix(".weight")
        for name, shape in spec.parameters.items()
        if name.endswith(".weight") and len(shape) == 1
    }
    return frozenset(names - spec.modules.keys() - spec.embeddings.keys())


def _unknown_fields(place: str, value: object, known: frozenset[str]) -> Iterator[str]:
    """The fields that are set and not ``known``, as ``place.field``."""
    for spec in fields(value):  # type: ignore[arg-type]
        if spec.name not in known and _is_set(getattr(value, spec.name)):
            yield f"{place}.{spec.name}" if place else spec.name


def _is_set(part: object) -> bool:
    return part is not None and not (isinstance(part, Mapping | tuple) and not part)


def _low_rank_modules(plan: AdapterPlan) -> Iterator[tuple[str, ModulePlan]]:
    yield from plan.modules.items()
    for experts in plan.experts.values():
        for expert in experts.experts:
            yield from expert.items()


def _refuse_rank(plan: AdapterPlan, name: str, rank: int, limit: int) -> NoReturn:
    raise LimitExceeded(
        f"adapter {plan.digest[:12]} has rank {rank} on {name}, this server allows {limit}; "
        "raise --max-lora-rank"
    )
