"""Packs adapters for the device outside of steps, so that a load is one copy.

A packed adapter has the engine's dtype and the pool's layout, for a GPU in page-locked memory. It
takes half the bytes of the float32 plan. The store keeps packed adapters in host memory and on
disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from loraplex_adapter_store.errors import LimitExceeded
from loraplex_adapter_store.plan import AdapterPlan, ExpertPlan, ModulePlan
from loraplex_adapter_store.report import JsonValue
from loraplex_kernels.formats.factors import AdapterFactors, SliceFactors
from loraplex_kernels.lora.packed_factors import PackedFactors
from loraplex_kernels.lora.pool import LoraPool, pool_bytes
from loraplex_server.engine.parallel.plan_cut import cut_plan, without_shared_bases
from loraplex_server.model.layers.packed_lora_linear import PackedLoraLinear
from loraplex_server.model.layers.tensor_parallel import ShardLayout

from .capabilities import EngineCapabilities
from .device_parts import DeviceParts
from .plan_tensors import copied

# Packed adapters are kept on disk. Increase this when the packed form of a plan changes, so that
# old files are redone. ``test_packing_is_what_its_format_says`` fails otherwise.
_FORMAT = 8


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """The unrouted factors and then those of each expert, rank by rank."""

    factors: tuple[PackedFactors, ...]
    rank: int  # largest LoRA rank of any module
    n_ranks: int = 1  # size of the tensor-parallel group

    @property
    def n_bytes(self) -> int:
        return sum(packed.n_bytes for packed in self.factors)

    def of_rank(self, rank: int) -> PackedAdapter:
        """Return the part of one tensor-parallel rank."""
        n = len(self.factors) // self.n_ranks
        return PackedAdapter(self.factors[rank * n : (rank + 1) * n], self.rank)

    def dump(self) -> tuple[JsonValue, Sequence[Tensor]]:
        """Return the rank, and five tensors for each of the ``PackedFactors``."""
        tensors: list[Tensor] = []
        for packed in self.factors:
            arrays = (packed.starts, packed.lengths, packed.keys, packed.ranks)
            tensors += [packed.image, *map(torch.from_numpy, arrays)]
        return self.rank, tensors


class AdapterPacker:
    """The store's ``Packer`` for one model and pool. Stateless, so any thread may use it."""

    def __init__(
        self,
        groups: Mapping[str, PackedLoraLinear],
        pool: LoraPool,
        capabilities: EngineCapabilities,
        layout: ShardLayout | None = None,  # of a tensor-parallel group, on rank 0
    ) -> None:
        self._layout = layout
        self._groups = tuple(groups.values())
        self._pool = pool
        self.capabilities = capabilities
        # The linears of layers by shared input, and those that share theirs with no other.
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
        """A digest of the packing format, the dtype and the modules."""
        return self._key

    def check(self, plan: AdapterPlan) -> None:
        """Raises AdapterRefused if the engine cannot apply all of ``plan``. Reads no values.

        Also checks the size of a prepared plan.
        """
        self.capabilities.check(plan)
        packed = _packed(plan)
        if packed is not None:
            self._check_size(plan, packed)

    def pack(self, plan: AdapterPlan) -> PackedAdapter:
        """Return the plan's packed adapter, or pack it. Raises AdapterRefused.

        A prepared plan was checked before, so the engine thread does not check it again.
        """
        prepared = _packed(plan)
        if prepared is not None:
            return prepared
        self.check(plan)
        ranks = [plan]
        if self._layout is not None:
            ranks = [cut_plan(plan, self._layout, rank) for rank in range(self._layout.size)]
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
        """Return the plan with a packed adapter instead of factors, sharing no memory with it.

        Returns a prepared plan unchanged. Raises AdapterRefused if the engine cannot serve it.
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
                experts={
                    name: replace(
                        block,
                        experts=tuple(
                            {n: _without_factors(m) for n, m in expert.items()}
                            for expert in block.experts
                        ),
                    )
                    for name, block in plan.experts.items()
                },
            )
        )
        sizes = {tensor.data_ptr(): tensor.nbytes for tensor in rest.tensors()}
        return replace(rest, packed_adapter=packed, n_bytes=packed.n_bytes + sum(sizes.values()))

    def parts(self, plan: AdapterPlan) -> DeviceParts:
        """Return the parts that PyTorch applies instead of the LoRA kernels."""
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

    def restore(self, header: JsonValue, tensors: Sequence[Tensor]) -> PackedAdapter:
        """Return the adapter that ``dump`` wrote, page-locked as by ``pack``."""
        assert isinstance(header, int)
        packed = []
        for at in range(0, len(tensors), 5):
            image, *tables = tensors[at : at + 5]
            arrays = (table.numpy().copy() for table in tables)  # they outlive the image
            packed.append(self._pool.adopt(PackedFactors(image, *arrays)))
        return PackedAdapter(
            tuple(packed), header, 1 if self._layout is None else self._layout.size
        )

    def _check_size(self, plan: AdapterPlan, packed: PackedAdapter) -> None:
        own = packed.of_rank(0)  # the largest part
        pool, n_slots, max_rank = self._pool, len(own.factors), self.capabilities.max_rank
        if packed.rank > max_rank:
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

    def _pooled_modules(self, plan: AdapterPlan) -> dict[str, ModulePlan]:
        """Return the modules that the LoRA kernels apply: factors, scales and biases of outputs.

        They may have input scales, which the model applies.
        """
        linears, replaced = self.capabilities.linears, plan.replaced_weights
        return {
            name: module
            for name, module in plan.modules.items()
            if name in linears
            and name not in replaced
            and module.shared is None
            and not module.operators
            and (module.in_scale is None or name in self._scalable)
        }

    def _factors(self, modules: Mapping[str, ModulePlan]) -> AdapterFactors:
        """Return the factors of the LoRA kernels, by target."""
        factors: dict[str, tuple[SliceFactors | None, ...]] = {}
        for group in self._groups:
            slices = tuple(
                _slice_factors(modules.get(name), is_lone=name in self.lone)
                for name in group.module_names
            )
            if any(part is not None for part in slices):
                factors[group.target.name] = slices
        return factors


def _packed(plan: AdapterPlan) -> PackedAdapter | None:
    packed = plan.packed_adapter
    assert packed is None or isinstance(packed, PackedAdapter), "a plan of another packer"
    return packed


def _expert_modules(experts: Mapping[str, ExpertPlan]) -> Iterable[Mapping[str, ModulePlan]]:
    """Yield the modules of expert e in all layers, which take slot 1 + e of the adapter."""
    for of_blocks in zip_longest(*(block.experts for block in experts.values()), fillvalue={}):
        yield {name: module for expert in of_blocks for name, module in expert.items()}


def _slice_factors(module: ModulePlan | None, *, is_lone: bool) -> SliceFactors | None:
    """Return the kernels' factors. If linears share their input, A absorbs the input scale."""
    if module is None:
        return None
    a = module.a
    if a is not None and module.in_scale is not None and not is_lone:
        a = a * module.in_scale
    return SliceFactors(a=a, b=module.b, scale=module.out_scale, bias=module.bias)


def _without_factors(module: ModulePlan) -> ModulePlan:
    return replace(module, a=None, b=None)
