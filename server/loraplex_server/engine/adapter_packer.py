"""Packs an adapter for the device outside of steps, so that loading it is one copy.

A packed adapter has the engine's dtype and the layout of the pool, in page-locked memory where a
GPU will fetch it. It takes half the bytes of the float32 plan. The store keeps packed adapters in
host memory and on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraplex_adapter_store.errors import LimitExceeded
from loraplex_adapter_store.plan import AdapterPlan, ExpertPlan, ModulePlan
from loraplex_adapter_store.report import JsonValue
from loraplex_kernels.factors import AdapterFactors, SliceFactors
from loraplex_kernels.packed_factors import PackedFactors
from loraplex_kernels.pool import LoraPool, pool_bytes
from loraplex_server.model.packed_lora_linear import PackedLoraLinear
from loraplex_server.model.tensor_parallel import ShardLayout

from .capabilities import EngineCapabilities
from .device_parts import DeviceParts
from .parallel.plan_cut import cut_plan, without_shared_bases
from .plan_tensors import copied

__all__ = ["AdapterPacker", "PackedAdapter"]

# Packed adapters are kept on disk. Count up when the same plan is packed otherwise: old files are
# then made anew. ``test_packing_is_what_its_format_says`` fails if that is forgotten.
_FORMAT = 8


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """``factors[0]`` are the unrouted ones, then one for each expert; so for each rank in turn."""

    factors: tuple[PackedFactors, ...]
    rank: int  # the largest of any module
    n_ranks: int = 1  # of the tensor-parallel group

    @property
    def n_bytes(self) -> int:
        return sum(packed.n_bytes for packed in self.factors)

    def of_rank(self, rank: int) -> PackedAdapter:
        """That rank's alone."""
        n = len(self.factors) // self.n_ranks
        return PackedAdapter(self.factors[rank * n : (rank + 1) * n], self.rank)


class AdapterPacker:
    """Packs adapters for one model and pool: the store's ``Packer``.

    Stateless: any thread, several at a time.
    """

    def __init__(
        self,
        groups: Mapping[str, PackedLoraLinear],
        pool: LoraPool,
        capabilities: EngineCapabilities,
        layout: ShardLayout | None = None,  # groups and pool are rank 0's of several
    ) -> None:
        self._layout = layout
        self._groups = tuple(groups.values())
        self._pool = pool
        self.capabilities = capabilities
        # Of the layers: by shared input, and those that share theirs with no other.
        self.scaled_groups = tuple(
            group.module_names
            for group in self._groups
            if group.module_names[0] != capabilities.output_head
        )
        self.lone = frozenset(group[0] for group in self.scaled_groups if len(group) == 1)
        self._scalable = frozenset(name for group in self.scaled_groups for name in group)
        modules = [(group.target, group.module_names) for group in self._groups]
        parts = (
            _FORMAT,
            str(pool.storage.dtype),
            pool.exponent_coding,
            modules,
            sorted(capabilities.routable),
            *([] if layout is None else [layout]),
        )
        self._key = hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def key(self) -> str:
        """Of the format, the dtype and the modules that there are to adapt."""
        return self._key

    def check(self, plan: AdapterPlan) -> None:
        """Raises AdapterRefused if the engine cannot apply all of ``plan``. Touches no values.

        Of a prepared plan the size is known, too.
        """
        self.capabilities.check(plan)
        if isinstance(plan.packed_adapter, PackedAdapter):
            self._check_size(plan, plan.packed_adapter)

    def pack(self, plan: AdapterPlan) -> PackedAdapter:
        """The packed adapter that the plan brings, or a new one. Raises AdapterRefused.

        A prepared plan was checked when it was prepared or loaded: not again on the engine thread.
        """
        if isinstance(plan.packed_adapter, PackedAdapter):
            return plan.packed_adapter
        self.check(plan)
        ranks = [plan] if self._layout is None else self._cut(plan, self._layout)
        sets = [
            modules
            for part in ranks
            for modules in (self._pooled_modules(part), *_expert_modules(part.experts))
        ]
        rank = max((module.rank for modules in sets for module in modules.values()), default=0)
        factors = tuple(self._pool.pack(self._factors(modules)) for modules in sets)
        packed = PackedAdapter(factors, rank, len(ranks))
        self._check_size(plan, packed)
        return packed

    def prepare(self, plan: AdapterPlan) -> AdapterPlan:
        """The plan with its packed adapter instead of its factors. Shares no memory with ``plan``.

        A plan that is prepared already comes back as it is. Raises AdapterRefused for what the
        engine cannot serve.
        """
        if plan.packed_adapter is not None:
            return plan
        if self._layout is not None:
            plan = without_shared_bases(plan)
        packed, pooled = self.pack(plan), self._pooled_modules(plan)
        rest = copied(
            replace(
                plan,
                modules={
                    name: _without_factors(module) if name in pooled else module
                    for name, module in plan.modules.items()
                },
                experts={name: _without_experts_factors(e) for name, e in plan.experts.items()},
            )
        )
        kept = {tensor.data_ptr(): tensor.nbytes for tensor in rest.tensors()}
        return replace(rest, packed_adapter=packed, n_bytes=packed.n_bytes + sum(kept.values()))

    def parts(self, plan: AdapterPlan) -> DeviceParts:
        """All that the LoRA kernels cannot apply: the model does, from the plan's own tensors."""
        if self._layout is not None:
            plan = cut_plan(plan, self._layout, 0)
        pooled = self._pooled_modules(plan)
        return DeviceParts.of(
            plan,
            {name: module for name, module in plan.modules.items() if name not in pooled},
            {name: m.in_scale for name, m in pooled.items() if m.in_scale is not None},
            input_embedding=self.capabilities.input_embedding,
            output_head=self.capabilities.output_head,
        )

    def dump(self, packed_adapter: object) -> tuple[JsonValue, Sequence[Tensor]]:
        """For a file: the rank, and five tensors for each of its `PackedFactors`."""
        assert isinstance(packed_adapter, PackedAdapter)
        tensors: list[Tensor] = []
        for packed in packed_adapter.factors:
            arrays = (packed.starts, packed.lengths, packed.keys, packed.ranks)
            tensors += [packed.image, *map(torch.from_numpy, arrays)]
        return packed_adapter.rank, tensors

    def restore(self, header: JsonValue, tensors: Sequence[Tensor]) -> PackedAdapter:
        """What was dumped, around the tensors; page-locked as by ``pack``."""
        assert isinstance(header, int)
        packed = []
        for at in range(0, len(tensors), 5):
            image, *tables = tensors[at : at + 5]
            arrays = (table.numpy().copy() for table in tables)  # they stay when the image goes
            packed.append(self._pool.adopt(PackedFactors(image, *arrays)))
        return PackedAdapter(
            tuple(packed), header, 1 if self._layout is None else self._layout.size
        )

    def _check_size(self, plan: AdapterPlan, packed: PackedAdapter) -> None:
        own = packed.of_rank(0)  # no other has more
        pool, n_slots, max_rank = self._pool, len(own.factors), self.capabilities.max_rank
        if max_rank is not None and packed.rank > max_rank:
            raise LimitExceeded(
                f"adapter {plan.digest[:12]} has rank {packed.rank}, this server allows "
                f"{max_rank}; raise --max-lora-rank"
            )
        n_bytes = own.n_bytes + pool_bytes(self.parts(plan).tensors(pool.storage.dtype))
        if n_bytes > pool.bytes_total or n_slots > pool.n_slots:
            raise LimitExceeded(
                f"adapter {plan.digest[:12]} needs {n_bytes:,} bytes and {n_slots} slots, the "
                f"device pool has {pool.bytes_total:,} and {pool.n_slots}; raise --adapter-memory "
                "or --max-loras"
            )

    @staticmethod
    def _cut(plan: AdapterPlan, layout: ShardLayout) -> list[AdapterPlan]:
        return [cut_plan(plan, layout, rank) for rank in range(layout.size)]

    def _pooled_modules(self, plan: AdapterPlan) -> dict[str, ModulePlan]:
        """Low-rank factors, scales and biases on the base's own product.

        Linears of the layers may have scales of inputs, too: those are the model's.
        """
        linears, replaced = self.capabilities.linears, plan.replaced_weights
        return {
            name: module
            for name, module in plan.modules.items()
            if name in linears
            and name not in replaced
            and not _is_beyond_low_rank(module)
            and (module.in_scale is None or name in self._scalable)
        }

    def _factors(self, modules: Mapping[str, ModulePlan]) -> AdapterFactors:
        """The parts of a plan that the LoRA kernels apply, by target."""
        factors: dict[str, tuple[SliceFactors | None, ...]] = {}
        for group in self._groups:
            slices = tuple(
                _slice_factors(modules.get(name), is_lone=name in self.lone)
                for name in group.module_names
            )
            if any(part is not None for part in slices):
                factors[group.target.name] = slices
        return factors


def _is_beyond_low_rank(module: ModulePlan) -> bool:
    return bool(module.shared is not None or module.operators)


def _expert_modules(experts: Mapping[str, ExpertPlan]) -> Iterable[Mapping[str, ModulePlan]]:
    """Expert e of all layers side by side: the factors of slot 1 + e of a routed adapter."""
    n_experts = max((len(plan.experts) for plan in experts.values()), default=0)
    for index in range(n_experts):
        merged: dict[str, ModulePlan] = {}
        for plan in experts.values():
            if index < len(plan.experts):
                merged.update(plan.experts[index])
        yield merged


def _slice_factors(module: ModulePlan | None, *, is_lone: bool) -> SliceFactors | None:
    """Factors of linears that share their input read it as it is: A takes the scale."""
    if module is None:
        return None
    a = module.a
    if a is not None and module.in_scale is not None and not is_lone:
        a = a * module.in_scale
    return SliceFactors(a=a, b=module.b, scale=module.out_scale, bias=module.bias)


def _without_factors(module: ModulePlan) -> ModulePlan:
    return replace(module, a=None, b=None)


def _without_experts_factors(plan: ExpertPlan) -> ExpertPlan:
    experts: Sequence[Mapping[str, ModulePlan]] = plan.experts
    bare = tuple({name: _without_factors(m) for name, m in one.items()} for one in experts)
    return replace(plan, experts=bare)
