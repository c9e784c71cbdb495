"""The linears of the base that adapters target, packed by shared input, and their modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from loraplex_adapter_store.operators.contract import BaseProduct, Delta
from loraplex_adapter_store.operators.kinds import MaskedWeight, SumDelta
from loraplex_adapter_store.plan import ModulePlan
from loraplex_kernels.formats.layout import LoraSegments, LoraTarget
from loraplex_kernels.layers.base_linear import BaseLinear, part_of
from loraplex_kernels.lora.ops import PreparedTarget
from loraplex_router.experts.expansion import projection_segments

from .forward_context import FallbackParts, FallbackRows, ForwardContext

# (slice, x, segments, out): adds to one packed linear's columns in place
_UNCHANGED = ModulePlan()


class LinearCut(NamedTuple):
    """The inputs and outputs of a linear that a rank has; None means all."""

    in_features: int  # of the whole linear
    inputs: slice | None
    outputs: slice | None


def apply_delta(delta: Delta, z: Tensor, product: BaseProduct, cut: LinearCut | None) -> Tensor:
    """Return the rank's part of ΔW z. ``product`` is its part of W z.

    Every rank has the whole delta. It sets the inputs of other ranks to 0 and keeps its own
    outputs. A delta that multiplies W itself is cut with the plan (``plan_cut``).
    """
    if cut is None or isinstance(delta, MaskedWeight):
        return delta.apply(z, product)
    if isinstance(delta, SumDelta):
        parts = [apply_delta(part, z, product, cut) for part in delta.parts]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
    if cut.inputs is not None:
        z = functional.pad(z, (cut.inputs.start, cut.in_features - cut.inputs.stop))
    update = delta.apply(z, product)
    return update if cut.outputs is None else update[:, cut.outputs]


class PackedLoraLinear:
    """Linears that read the same tensor (q,k,v; gate,up; or one alone), with the step's adapters.

    They are one packed product and one call of the LoRA kernels.
    """

    def __init__(
        self,
        name: str,
        module_names: Sequence[str],
        packed: BaseLinear,
        step: ForwardContext,
        reduce: Callable[[Tensor], None] | None = None,
        cuts: Sequence[LinearCut] | None = None,
    ) -> None:
        """``reduce``: adds the outputs of the other ranks in place. ``cuts``: of each linear."""
        self.target = LoraTarget(name, packed.in_features, packed.out_features)
        self.module_names = tuple(module_names)
        self.packed = packed
        self.lora: PreparedTarget | None = None  # set when the device pool is built
        self.reduce = reduce
        n = len(self.module_names)
        self.columns = [part_of(packed.out_features, index) for index in range(n)]
        self._fallback = [
            FallbackLinear(name, packed, self.columns[index], None if cuts is None else cuts[index])
            for index, name in enumerate(self.module_names)
        ]
        self._step = step

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``x`` [n_rows, in_features] to [n_rows, Σ out_features]."""
        step = self._step
        x = self.scaled_inputs(x)
        if step.segments is None or self.lora is None or self._scales_slices():
            out: Tensor = self.packed(x)
            self.add_adapters(x, out, step.segments, step.fallback)
        else:
            out = self.lora.linear_with_lora(self.packed, x, step.segments)
            self._apply_fallback(x, out, step.fallback)
        self._add_projection_experts(x, out)
        if self.reduce is not None:
            self.reduce(out)
        return out

    def into(self, x: Tensor, out: Tensor) -> None:
        """Do the same as a call, but write to ``out`` [n_rows, Σ out_features]."""
        x = self.scaled_inputs(x)
        self.packed.into(x, out)
        self.add_step_adapters(x, out)

    def scaled_inputs(self, x: Tensor) -> Tensor:
        """Return ``x`` [n_rows, in_features] as the step's adapters scale it (IA³ in the MLP).

        Only a linear that is packed alone scales its input here; see ``_scale_slices``.
        """
        if len(self.module_names) > 1:
            return x
        for fallback in self._step.fallback:
            scale = fallback.parts.in_scales.get(self.module_names[0])
            if scale is not None:
                x = x.index_copy(0, fallback.rows, x[fallback.rows] * scale.to(x.dtype))
        return x

    def add_step_adapters(self, x: Tensor, out: Tensor) -> None:
        """Add the products of the step's adapters, except those of experts of an MLP block."""
        step = self._step
        self.add_adapters(x, out, step.segments, step.fallback)
        self._add_projection_experts(x, out)

    @property
    def bound(self) -> PreparedTarget:
        """The operator of the device pool. Raises RuntimeError before the pool is built."""
        if self.lora is None:
            raise RuntimeError(f"no device pool is bound to {self.target.name}")
        return self.lora

    def add_adapters(
        self,
        x: Tensor,
        out: Tensor,
        segments: LoraSegments | None,
        fallback: tuple[FallbackRows, ...],
    ) -> None:
        """Add the products of the rows' adapters in place to ``out``, the base product of ``x``."""
        if fallback and len(self.module_names) > 1:
            self._scale_slices(x, out, fallback)
        if segments is not None and self.lora is not None:
            self.lora(x, segments, out)
        self._apply_fallback(x, out, fallback)

    def _scales_slices(self) -> bool:
        """Return True if linears of this group read different inputs for some row of the step."""
        return len(self.module_names) > 1 and any(
            not rows.parts.in_scales.keys().isdisjoint(self.module_names)
            for rows in self._step.fallback
        )

    def _scale_slices(self, x: Tensor, out: Tensor, fallback: tuple[FallbackRows, ...]) -> None:
        """Replace the base products of rows with scaled inputs, linear by linear."""
        for rows in fallback:
            for index, name in enumerate(self.module_names):
                scale = rows.parts.in_scales.get(name)
                if scale is not None:
                    scaled = x[rows.rows] * scale.to(x.dtype)
                    own = x.new_empty(scaled.shape[0], self.target.out_features[index])
                    self.packed.into_part(index, scaled, own)
                    out[rows.rows, self.columns[index]] = own

    def _apply_fallback(self, x: Tensor, out: Tensor, fallback: tuple[FallbackRows, ...]) -> None:
        for rows in fallback:
            for linear in self._fallback:
                linear.apply(x, out, rows)

    def _add_projection_experts(self, x: Tensor, out: Tensor) -> None:
        """Add the experts of projections, each with its own gate (MoLA, LoRAMoE, Arrow)."""
        if not self._step.routes_projections or self.lora is None:
            return
        for index, columns in enumerate(self.columns):
            routed = self._step.routed.get(self.module_names[index])
            if routed:
                self.lora.apply_slice(index, x, projection_segments(x, routed), out[:, columns])


@dataclass(frozen=True, slots=True)
class FallbackLinear:
    """A linear of a packed group."""

    name: str
    packed: BaseLinear  # of the group
    columns: slice  # of the linear in the group's output
    cut: LinearCut | None  # of the linear on this rank

    def apply(self, x: Tensor, out: Tensor, fallback: FallbackRows) -> None:
        """Replace the adapter's rows of ``out``, which has the base product of ``x``, in place."""
        if fallback.parts.changes(self.name):
            rows = fallback.rows
            y = self._output(x[rows], out[rows, self.columns], fallback.parts)
            out[rows, self.columns] = y.to(out.dtype)

    def _output(self, x: Tensor, y: Tensor, parts: FallbackParts) -> Tensor:
        """Return one adapter's output. ``y`` = W x + b is the base's."""
        module = parts.modules.get(self.name, _UNCHANGED)
        weight, token_rows = parts.replaced_weights.get(self.name), parts.token_rows.get(self.name)
        z = x if module.in_scale is None else x * module.in_scale.to(x.dtype)
        if module.input_operator is not None:
            z = module.input_operator.apply(z)
        bias = self.packed.bias
        if weight is not None:
            own_bias = None if bias is None else bias[self.columns].to(weight)
            y = functional.linear(z, weight, own_bias)
        elif z is not x:
            y = self.packed(z)[:, self.columns]
        y = self._add_module(module, z, y)
        if token_rows is not None:  # of the head
            own_bias = None if bias is None else bias[token_rows.token_ids].float()
            own = functional.linear(x.float(), token_rows.rows.float(), own_bias)
            y = y.index_copy(1, token_rows.token_ids, own.to(y.dtype))
        return y

    def _add_module(self, module: ModulePlan, z: Tensor, y: Tensor) -> Tensor:
        """Return the output of ``module``, given its input ``z`` and ``y`` = W z + b."""
        if module.a is not None and module.b is not None:
            y = y + functional.linear(functional.linear(z, module.a), module.b)
        if module.shared is not None:
            y = y + module.shared.apply(z)
        if module.delta_operator is not None:
            y = y + apply_delta(module.delta_operator, z, self._base_product, self.cut)
        if module.output_operator is not None:
            y = module.output_operator.apply(y)
        if module.out_scale is not None:
            y = y * module.out_scale
        return y if module.bias is None else y + module.bias

    def _base_product(self, x: Tensor) -> Tensor:
        """Return W x of the base, without bias."""
        y: Tensor = self.packed(x)[:, self.columns]
        bias = self.packed.bias
        return y if bias is None else y - bias[self.columns].to(y.dtype)


class LoraLinear(nn.Module):
    """A linear of a packed group. The group's first call computes the output of all of them."""

    def __init__(self, group: PackedLoraLinear, index: int, last: _LastOutput) -> None:
        super().__init__()
        self.group = group
        self._index = index
        self._columns = group.columns[index]
        self.in_features = group.target.in_features
        self.out_features = group.target.out_features[index]
        self._last = last

    @staticmethod
    def of_group(group: PackedLoraLinear) -> list[LoraLinear]:
        """Return a module for each linear of the group. They share its last output."""
        last = _LastOutput()
        return [LoraLinear(group, index, last) for index in range(group.target.n_slices)]

    @property
    def weight(self) -> Tensor:
        """The unpacked weight [out, in], for model code that reads its dtype."""
        return self.group.packed.part(self._index)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        last = self._last
        if last.x is x and last.out is not None:
            out = last.out
        else:
            out = self.group(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1)
            last.x, last.out, last.n_left = x, out, self.group.target.n_slices
        last.n_left -= 1
        if last.n_left == 0:
            last.x = last.out = None
        return out[..., self._columns]


class _LastOutput:
    """The output that the other linears of a group read next."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.out: Tensor | None = None
        self.n_left = 0
