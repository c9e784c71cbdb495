"""The linears of the base that adapters target, packed by shared input.

A ``PackedLoraLinear`` is one or several linears that read the same tensor (q,k,v; gate,up; or one
alone): one packed product, one LoRA call. ``LoraLinear`` stands where the module stood in the
transformers model; the first of a group to be called computes all, the others take their slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

from loraplex_adapter_store.operators.contract import BaseProduct
from loraplex_adapter_store.plan import ModulePlan
from loraplex_kernels.experts import Activation, StepPairs
from loraplex_kernels.layout import LoraSegments, LoraTarget
from loraplex_kernels.moe_by_slot import RoutedPairs, sum_pairs
from loraplex_kernels.ops import PreparedTarget
from loraplex_kernels.packed_linear import part_of
from loraplex_kernels.quantized_linear import BaseLinear
from loraplex_router.experts import projection_segments

from .cut_delta import LinearCut, apply_delta
from .forward_context import FallbackParts, FallbackRows, ForwardContext

__all__ = ["ApplySlice", "LoraLinear", "PackedLoraLinear"]

# (slice, x, segments, out): adds to one packed linear's columns in place
ApplySlice = Callable[[int, Tensor, LoraSegments, Tensor], None]


class PackedLoraLinear:
    """One packed base product with the adapters of the step's rows on top."""

    def __init__(
        self,
        name: str,
        module_names: Sequence[str],
        packed: BaseLinear,
        step: ForwardContext,
        reduce: Callable[[Tensor], None] | None = None,
        cuts: Sequence[LinearCut] | None = None,
    ) -> None:
        """``reduce``: adds what the other ranks made of their parts of ``x``, in place.

        ``cuts``: what each of the linears is a part of.
        """
        self.target = LoraTarget(name, packed.in_features, packed.out_features)
        self.module_names = tuple(module_names)
        self.packed = packed
        self.lora: PreparedTarget | None = None  # set when the device pool is built
        self.apply_slice: ApplySlice | None = None
        self.reduce = reduce
        self._cuts = [None] * len(self.module_names) if cuts is None else list(cuts)
        parts = range(len(self.module_names))
        self._columns = [part_of(packed.out_features, index) for index in parts]
        self._step = step

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [n_rows, in_features] → [n_rows, Σ out_features]."""
        step = self._step
        x = self.scaled_inputs(x)
        if step.segments is None or self.lora is None or self._scales_slices():
            out = self.base_product(x)
            self.add_adapters(x, out, step.segments, step.fallback)
        else:
            out = self.lora.linear_with_lora(self.packed, x, step.segments)
            self._add_unpooled(x, out, step.fallback)
        self.add_projection_experts(x, out)
        if self.reduce is not None:
            self.reduce(out)
        return out

    def into(self, x: Tensor, out: Tensor) -> None:
        """As a call, but writes to ``out`` [n_rows, Σ out_features]."""
        x = self.scaled_inputs(x)
        self._base_into(x, out)
        self.add_step_adapters(x, out)

    def base_product(self, x: Tensor) -> Tensor:
        """The base's, in a recorded step of what each of the linears reads for its row's adapter;
        in other steps ``add_adapters`` mends the rows that have scales."""
        if self._inputs_are_shared():
            return self.packed(x)
        out = x.new_empty(x.shape[0], self.packed.n_out)
        self._base_into(x, out)
        return out

    def scaled_inputs(self, x: Tensor) -> Tensor:
        """``x`` [n_rows, in_features] as the step's adapters scale it, for a linear that is packed
        with no other. In a recorded step in place, since nobody reads ``x`` behind it."""
        step = self._step
        if len(self.module_names) > 1:
            return x
        if step.by_slot is not None:
            step.by_slot.scale_inputs(self.module_names[0], x)
            return x
        for fallback in step.fallback:
            scale = fallback.parts.in_scales.get(self.module_names[0])
            if scale is not None:
                x = x.index_copy(0, fallback.rows, x[fallback.rows] * scale.to(x.dtype))
        return x

    def add_step_adapters(self, x: Tensor, out: Tensor) -> None:
        """Adds what the step's adapters make of ``x``, experts of an MLP block excepted."""
        step = self._step
        self.add_adapters(x, out, step.segments, step.fallback)
        self.add_projection_experts(x, out)

    def add_projection_experts(self, x: Tensor, out: Tensor) -> None:
        """MoLA, LoRAMoE, Arrow: each projection has its own gate, so each slice its segments."""
        if not self._step.routes_projections or self.apply_slice is None:
            return
        for index, columns in enumerate(self._columns):
            segments = self._projection_segments(index, x)
            if segments is not None:
                self.apply_slice(index, x, segments, out[:, columns])

    def gate_pairs(self, x: Tensor, gate_up: Tensor, pairs: RoutedPairs) -> Tensor:
        """``loraplex_kernels.moe_by_slot.gate_pairs`` over this group."""
        return self._bound().gate_pairs(x, gate_up, pairs)

    def down_pairs(self, pair_act: Tensor, act: Tensor, pairs: RoutedPairs) -> Tensor:
        """The down products of rows, with their pairs' adapters on top: ``moe_by_slot``."""
        out: Tensor = self.packed(act)
        by_slot = self._step.by_slot
        if by_slot is not None and by_slot.own_downs:
            of_pairs = self.packed(pair_act)
            self._bound()(pair_act, pairs.by_pair, of_pairs)
            sum_pairs(of_pairs, pairs, out)
        else:
            self._bound().add_pairs(pair_act, act, pairs, out)
        return out

    def apply_segments(self, x: Tensor, segments: LoraSegments, out: Tensor) -> None:
        """The low-rank operator alone, with the given segments."""
        self._bound()(x, segments, out)

    def moe_gate_up(
        self, activation: Activation, x: Tensor, pairs: StepPairs, segments: LoraSegments
    ) -> tuple[Tensor, Tensor]:
        """``loraplex_kernels.experts.moe_gate_up`` over this group."""
        return self._bound().moe_gate_up(self.packed, activation, x, pairs, segments)

    def moe_down(
        self, x: Tensor, of_pairs: Tensor, pairs: StepPairs, segments: LoraSegments
    ) -> Tensor:
        """``loraplex_kernels.experts.moe_down`` over this group."""
        return self._bound().moe_down(self.packed, x, of_pairs, pairs, segments)

    def _bound(self) -> PreparedTarget:
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
        """Adds to ``out``, the base's product of ``x``, in place what the rows' adapters make of
        ``x``."""
        if fallback and len(self.module_names) > 1:
            self._scale_slices(x, out, fallback)
        if segments is not None and self.lora is not None:
            self.lora(x, segments, out)
        self._add_unpooled(x, out, fallback)

    def _base_into(self, x: Tensor, out: Tensor) -> None:
        by_slot = self._step.by_slot
        inputs = None if by_slot is None else by_slot.inputs_of_each(self.module_names[0], x)
        if inputs is None:
            self.packed.into(x, out)
            return
        for index, columns in enumerate(self._columns):
            self.packed.into_part(index, inputs[index], out[:, columns])

    def _inputs_are_shared(self) -> bool:
        by_slot = self._step.by_slot
        return by_slot is None or self.module_names[0] not in by_slot.slice_scales

    def _scales_slices(self) -> bool:
        """Whether the step has rows of which linears of this group read other inputs."""
        return not self._inputs_are_shared() or (
            len(self.module_names) > 1
            and any(
                not rows.parts.in_scales.keys().isdisjoint(self.module_names)
                for rows in self._step.fallback
            )
        )

    def _scale_slices(self, x: Tensor, out: Tensor, fallback: tuple[FallbackRows, ...]) -> None:
        """The products of scaled inputs in the place of the base's, linear by linear."""
        for rows in fallback:
            for index, name in enumerate(self.module_names):
                scale = rows.parts.in_scales.get(name)
                if scale is not None:
                    scaled = x[rows.rows] * scale.to(x.dtype)
                    own = x.new_empty(scaled.shape[0], self.target.out_features[index])
                    self.packed.into_part(index, scaled, own)
                    out[rows.rows, self._columns[index]] = own

    def _add_unpooled(self, x: Tensor, out: Tensor, fallback: tuple[FallbackRows, ...]) -> None:
        for rows in fallback:
            self._apply_planned(x, out, rows)

    def _projection_segments(self, index: int, x: Tensor) -> LoraSegments | None:
        """Rows by expert of slice ``index``; None if no row of the step has experts there."""
        step, name = self._step, self.module_names[index]
        if step.by_slot is not None:
            return step.by_slot.projection_segments(
                name, x, slice_index=index, n_slices=self.target.n_slices
            )
        routed = step.routed.get(name)
        return projection_segments(x, routed) if routed else None

    def _apply_planned(self, x: Tensor, out: Tensor, fallback: FallbackRows) -> None:
        for name, columns, cut in zip(self.module_names, self._columns, self._cuts, strict=True):
            if fallback.parts.changes(name):
                y = out[fallback.rows, columns]
                out[fallback.rows, columns] = self._planned(
                    name, x[fallback.rows], y, columns, fallback.parts, cut
                ).to(out.dtype)

    def _planned(
        self,
        name: str,
        x: Tensor,
        y: Tensor,
        columns: slice,
        parts: FallbackParts,
        cut: LinearCut | None,
    ) -> Tensor:
        """One adapter's output of one linear; ``y`` is the base's."""
        module = parts.modules.get(name, _UNCHANGED)
        weight, token_rows = parts.replaced_weights.get(name), parts.token_rows.get(name)
        z = _input_of(module, x)
        if z is not x or weight is not None:
            y = self._product(z, weight, columns)
        y = _output_of(module, z, y, self._base_without_bias(columns), cut)
        if token_rows is not None:  # of the head
            bias = self.packed.bias
            own = functional.linear(
                x.float(),
                token_rows.rows.float(),
                None if bias is None else bias[token_rows.token_ids].float(),
            )
            y = y.index_copy(1, token_rows.token_ids, own.to(y.dtype))
        return y

    def _product(self, x: Tensor, weight: Tensor | None, columns: slice) -> Tensor:
        """W x + b of one linear, with the adapter's own W if it has one."""
        if weight is None:
            return self.packed(x)[:, columns]
        bias = self.packed.bias
        return functional.linear(x, weight, None if bias is None else bias[columns].to(weight))

    def _base_without_bias(self, columns: slice) -> BaseProduct:
        def product(x: Tensor) -> Tensor:
            bias = self.packed.bias
            y: Tensor = self.packed(x)[:, columns]
            return y if bias is None else y - bias[columns].to(y.dtype)

        return product


_UNCHANGED = ModulePlan()


def _input_of(module: ModulePlan, x: Tensor) -> Tensor:
    """What the weight is multiplied by; ``x`` itself where the adapter leaves it alone."""
    if module.in_scale is not None:
        x = x * module.in_scale.to(x.dtype)
    return x if module.input_operator is None else module.input_operator.apply(x)


def _output_of(
    module: ModulePlan, z: Tensor, y: Tensor, product: BaseProduct, cut: LinearCut | None
) -> Tensor:
    """All that ``ModulePlan`` adds to ``y`` = W z + b; ``product`` is the base's W."""
    if module.a is not None and module.b is not None:
        y = y + functional.linear(functional.linear(z, module.a), module.b)
    if module.shared is not None:
        y = y + module.shared.apply(z)
    if module.delta_operator is not None:
        y = y + apply_delta(module.delta_operator, z, product, cut)
    if module.output_operator is not None:
        y = module.output_operator.apply(y)
    if module.out_scale is not None:
        y = y * module.out_scale
    return y if module.bias is None else y + module.bias


class LoraLinear(nn.Module):
    """Replaces in the model slice ``index`` of a group. Reads [..., in], returns [..., out]."""

    def __init__(self, group: PackedLoraLinear, index: int, last: _LastOutput) -> None:
        super().__init__()
        self.group = group
        self._index = index
        features = group.target.out_features
        self.in_features = group.target.in_features
        self.out_features = features[index]
        first = sum(features[:index])
        self._columns = slice(first, first + features[index])
        self._last = last

    @staticmethod
    def of_group(group: PackedLoraLinear) -> list[LoraLinear]:
        """One module for each packed linear, sharing the group's last output."""
        last = _LastOutput()
        return [LoraLinear(group, index, last) for index in range(group.target.n_slices)]

    @property
    def weight(self) -> Tensor:
        """[out, in], out of the packed form: for model code that looks at it (its dtype)."""
        return self.group.packed.part(self._index)

    def forward(self, x: Tensor) -> Tensor:
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
    """The output that the other slices of a group will ask for next."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.out: Tensor | None = None
        self.n_left = 0
