"""An adapter in the device's form, made away from the steps: placing it is then one copy.

The store's host tier keeps adapters so: in the engine's dtype and the layout of the pool,
page-locked where a GPU will fetch them. That is half the bytes of the float32 plan, and nothing is
cast, cut or transposed when an adapter comes to the device. The store keeps them so on disk, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from loraplex_adapter_store.plan import AdapterPlan, ExpertPlan, ModulePlan
from loraplex_adapter_store.report import JsonValue
from loraplex_kernels.factors import AdapterFactors, SliceFactors
from loraplex_kernels.packed_factors import PackedFactors
from loraplex_kernels.pool import LoraPool
from loraplex_server.model.packed_lora_linear import PackedLoraLinear

from .errors import AdapterUnservable

__all__ = ["AdapterPacker", "PackedAdapter", "is_beyond_low_rank"]

_T = TypeVar("_T")

# Forms are kept on disk. Count up whenever the same plan gets another form: then old ones are
# made anew. ``test_the_form_of_a_plan_is_what_its_format_says`` fails where that was forgotten.
_FORMAT = 5


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """``factors[0]`` are the unrouted ones, then one for each expert."""

    factors: tuple[PackedFactors, ...]
    rank: int  # the largest of any module

    @property
    def n_bytes(self) -> int:
        return sum(packed.n_bytes for packed in self.factors)


class AdapterPacker:
    """Makes device forms for one model and pool: the store's ``Packer``.

    Stateless: any thread, several at a time.
    """

    def __init__(
        self,
        groups: Mapping[str, PackedLoraLinear],
        pool: LoraPool,
        routable: Collection[str],
    ) -> None:
        """``routable``: the MLP blocks and projections that may have experts."""
        self._groups = tuple(groups.values())
        self._pool = pool
        self._routable = frozenset(routable)
        modules = [(group.target, group.module_names) for group in self._groups]
        parts = (
            _FORMAT,
            str(pool.storage.dtype),
            pool.exponent_coding,
            modules,
            sorted(self._routable),
        )
        self._key = hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def key(self) -> str:
        """Of the format, the dtype and the modules that there are to adapt."""
        return self._key

    def form(self, plan: AdapterPlan) -> PackedAdapter:
        """The form a plan has already, or a new one. Raises AdapterUnservable."""
        if isinstance(plan.packed_adapter, PackedAdapter):
            return plan.packed_adapter
        self._check_experts(plan)
        sets = [plan.modules, *_expert_modules(plan.experts)]
        rank = max((module.rank for modules in sets for module in modules.values()), default=0)
        pack = self._pool.pack
        return PackedAdapter(tuple(pack(self._factors(modules)) for modules in sets), rank)

    def prepare(self, plan: AdapterPlan) -> AdapterPlan:
        """The plan with its device form instead of its factors. Shares no memory with ``plan``.

        A plan that is prepared already comes back as it is, and so does one that cannot be served:
        that is refused when it is asked for.
        """
        if plan.packed_adapter is not None:
            return plan
        try:
            form = self.form(plan)
        except AdapterUnservable:
            return plan
        rest = _copied(
            replace(
                plan,
                modules={name: _without_factors(part) for name, part in plan.modules.items()},
                experts={name: _without_experts_factors(e) for name, e in plan.experts.items()},
            )
        )
        kept = {tensor.data_ptr(): tensor.nbytes for tensor in rest.tensors()}
        return replace(rest, packed_adapter=form, n_bytes=form.n_bytes + sum(kept.values()))

    def dump(self, form: object) -> tuple[JsonValue, Sequence[Tensor]]:
        """For a file: the rank, and five tensors for each of its `PackedFactors`."""
        assert isinstance(form, PackedAdapter)
        tensors: list[Tensor] = []
        for packed in form.factors:
            arrays = (packed.starts, packed.lengths, packed.keys, packed.ranks)
            tensors += [packed.image, *map(torch.from_numpy, arrays)]
        return form.rank, tensors

    def restore(self, header: JsonValue, tensors: Sequence[Tensor]) -> PackedAdapter:
        """What was dumped, around the tensors; page-locked where ``form`` would be."""
        assert isinstance(header, int)
        packed = []
        for at in range(0, len(tensors), 5):
            image, *tables = tensors[at : at + 5]
            arrays = (table.numpy().copy() for table in tables)  # they stay when the image goes
            packed.append(self._pool.adopt(PackedFactors(image, *arrays)))
        return PackedAdapter(tuple(packed), header)

    def _factors(self, modules: Mapping[str, ModulePlan]) -> AdapterFactors:
        """The parts of a plan that the LoRA kernels apply, by target."""
        factors: dict[str, tuple[SliceFactors | None, ...]] = {}
        for group in self._groups:
            slices = tuple(_slice_factors(modules.get(name)) for name in group.module_names)
            if any(part is not None for part in slices):
                factors[group.target.name] = slices
        return factors

    def _check_experts(self, plan: AdapterPlan) -> None:
        """Nothing of an expert may be left out silently."""
        stray = sorted(plan.experts.keys() - self._routable)
        if stray:
            raise AdapterUnservable(
                f"adapter {plan.digest[:12]} routes at {stray[0]!r} and {len(stray) - 1} more "
                "places where this base has no gated MLP or linear to route"
            )
        for place, experts in plan.experts.items():
            for module_name in {name for expert in experts.experts for name in expert}:
                if module_name != place and module_name.rpartition(".")[0] != place:
                    raise AdapterUnservable(
                        f"adapter {plan.digest[:12]} has experts for {module_name!r} behind the "
                        f"gate of {place!r}, which does not contain it"
                    )
        for modules in _expert_modules(plan.experts):
            both = sorted(modules.keys() & plan.modules.keys())
            if both:
                raise AdapterUnservable(
                    f"adapter {plan.digest[:12]} has experts and plain factors on {both[0]!r}"
                )
            for name, module in modules.items():
                if is_beyond_low_rank(module):
                    raise AdapterUnservable(
                        f"adapter {plan.digest[:12]} has an expert with an input scale or a "
                        f"shared basis on {name!r}; experts are low-rank factors here"
                    )


def is_beyond_low_rank(module: ModulePlan) -> bool:
    """Whether the LoRA kernels cannot apply it: the model does, from the plan's own tensors."""
    return module.in_scale is not None or module.shared is not None


def _expert_modules(experts: Mapping[str, ExpertPlan]) -> Iterable[Mapping[str, ModulePlan]]:
    """Expert e of all layers side by side: the factors of slot 1 + e of a routed adapter."""
    n_experts = max((len(plan.experts) for plan in experts.values()), default=0)
    for index in range(n_experts):
        merged: dict[str, ModulePlan] = {}
        for plan in experts.values():
            if index < len(plan.experts):
                merged.update(plan.experts[index])
        yield merged


def _slice_factors(module: ModulePlan | None) -> SliceFactors | None:
    if module is None or is_beyond_low_rank(module):
        return None
    return SliceFactors(a=module.a, b=module.b, scale=module.out_scale, bias=module.bias)


def _without_factors(module: ModulePlan) -> ModulePlan:
    return module if is_beyond_low_rank(module) else replace(module, a=None, b=None)


def _without_experts_factors(plan: ExpertPlan) -> ExpertPlan:
    experts: Sequence[Mapping[str, ModulePlan]] = plan.experts
    bare = tuple({name: _without_factors(m) for name, m in one.items()} for one in experts)
    return replace(plan, experts=bare)


def _copied(value: _T) -> _T:
    """The same with tensors of its own: views of a plan's file would keep all of it in memory.

    What was one tensor in several places (shared bases) stays one.
    """
    copies: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor] = {}

    def copy(part: object) -> object:
        if isinstance(part, Tensor):
            key = (part.data_ptr(), tuple(part.shape), part.stride())
            if key not in copies:
                copies[key] = part.clone()
            return copies[key]
        if isinstance(part, Mapping):
            return {key: copy(item) for key, item in part.items()}
        if isinstance(part, tuple):
            return tuple(copy(item) for item in part)
        if is_dataclass(part) and not isinstance(part, type):
            return replace(part, **{f.name: copy(getattr(part, f.name)) for f in fields(part)})
        return part

    return cast(_T, copy(value))
