"""The experts of a mixture in packed products, in place of transformers' stacked parameters."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from loraplex_kernels.cpu.model_ops import dtype_code
from loraplex_kernels.formats.storage import WeightRange
from loraplex_kernels.layers.base_linear import BaseLinear
from loraplex_kernels.layers.gated_experts import GatedExperts
from loraplex_kernels.layers.packed_linear import PackedLinear, packed_words

_PROBE_ROWS = 3
_PROBE_TOLERANCE = 0.05  # of the largest output: in bfloat16 the orders of sums differ


class PackedExperts(nn.Module):
    """Experts without parameters; ``stacked_weights`` read the matrices under their names.

    Native code runs experts with SiLU. Else each expert that some row chose runs on its rows, in
    the order of the experts, as in transformers.
    """

    def __init__(
        self,
        gate_up: Sequence[BaseLinear],  # of each expert [2 · width, hidden]
        down: Sequence[BaseLinear],  # of each expert [hidden, width]
        activation: Callable[[Tensor], Tensor],
        stacked_weights: Mapping[str, Callable[[], Tensor]],
    ) -> None:
        """``stacked_weights``: readers of [n_experts, 2 · width, hidden] and [.., hidden, width],
        under the names of transformers' parameters."""
        super().__init__()
        self.stacked_weights = stacked_weights
        self._gate_up, self._down, self._activation = gate_up, down, activation
        is_native = is_silu(activation) and GatedExperts.takes(gate_up, down)
        self._native = GatedExperts(gate_up, down) if is_native else None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Map rows [n, hidden] by their experts [n, k], weighted by [n, k]."""
        if self._native is not None:
            return self._native(hidden_states, top_k_index, top_k_weights)
        return self.run_with({}, (hidden_states, top_k_index, top_k_weights))

    def run_with(self, changes: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        """Run ``forward`` of ``inputs`` with the weights in ``changes`` in place of its own."""
        hidden, index, weights = inputs
        out = torch.zeros_like(hidden)
        for expert in torch.unique(index).tolist():
            rows, places = torch.where(index == expert)
            x = hidden[rows]
            gate_up = _product("gate_up_proj", self._gate_up, changes, expert, x)
            gate, up = gate_up.chunk(2, dim=-1)
            inner = self._activation(gate) * up
            y = _product("down_proj", self._down, changes, expert, inner)
            y = y * weights[rows, places, None]
            out.index_add_(0, rows, y.to(out.dtype))
        return out


def pack_experts(model: nn.Module, *, exponent_coding: bool) -> None:
    """Pack the stacked experts of a model on a CPU that native code computes as they do.

    Frees a layer's parameters before the next layer is packed.
    """
    for name, module in list(model.named_modules()):
        if _is_packable(module):
            packed = _packed(module, exponent_coding=exponent_coding)
            if _answers_alike(module, packed):
                model.set_submodule(name, packed)


def is_silu(activation: object) -> bool:
    """Return True for x · σ(x)."""
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _is_packable(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    if own.keys() != {"gate_up_proj", "down_proj"}:
        return False
    gate_up, down = own["gate_up_proj"], own["down_proj"]
    return (
        is_silu(getattr(module, "act_fn", None))
        and gate_up.is_cpu
        and dtype_code(gate_up.dtype) is not None
        and gate_up.dtype is down.dtype
        and gate_up.dim() == down.dim() == 3
        and gate_up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])
    )


def _packed(module: nn.Module, *, exponent_coding: bool) -> PackedExperts:
    stacks = [module.get_parameter(name).detach() for name in ("gate_up_proj", "down_proj")]
    n_words = [packed_words([w.shape[1]], w.shape[2], w.dtype) * w.shape[0] for w in stacks]
    memory = WeightRange(sum(n_words))
    gate_up, down = (
        [
            PackedLinear([weight], [None], exponent_coding=exponent_coding, memory=memory)
            for weight in stack
        ]
        for stack in stacks
    )
    readers = {"gate_up_proj": partial(_stack, gate_up), "down_proj": partial(_stack, down)}
    return PackedExperts(gate_up, down, module.get_submodule("act_fn"), readers)


@torch.no_grad()
def _answers_alike(theirs: nn.Module, packed: PackedExperts) -> bool:
    n_experts, hidden, _ = theirs.get_parameter("down_proj").shape
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_PROBE_ROWS, hidden, generator=generator)
    rows = rows.to(theirs.get_parameter("down_proj").dtype)
    index = torch.randint(n_experts, (_PROBE_ROWS, 1), generator=generator)
    weights = torch.rand(_PROBE_ROWS, 1, generator=generator).to(rows.dtype)
    expected, found = (module(rows, index, weights).float() for module in (theirs, packed))
    return bool((found - expected).abs().max() <= _PROBE_TOLERANCE * expected.abs().max())


def _product(
    name: str, linears: Sequence[BaseLinear], changes: Mapping[str, Tensor], expert: int, x: Tensor
) -> Tensor:
    if name in changes:
        return nn.functional.linear(x, changes[name][expert])
    return linears[expert](x)


def _stack(linears: Sequence[BaseLinear]) -> Tensor:
    return torch.stack([linear.matrix() for linear in linears])
