"""The gated activation of an MLP in one launch.

    out[t, f] = act(gate_up[t, f]) · gate_up[t, F + f]        act: SiLU or GELU by tanh

Shapes: gate_up [T, 2F], out [T, F]. ``act`` is computed in float32 and rounded to the rows' dtype
before the product, as in ``silu_mul_reference``.
"""

import triton
import triton.language as tl
from torch import Tensor

_ACTS = {"silu": False, "gelu_tanh": True}
_BLOCK = 1024
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def gated(gate, up, IS_GELU: tl.constexpr):
    """Return act(gate) · up in float32; ``gate`` and ``up`` have the rows' dtype."""
    g = gate.to(tl.float32)
    u = g
    if IS_GELU:
        u = _TWO_SQRT_2_OVER_PI * (g + 0.044715 * g * g * g)  # 1 + tanh(u) = 2 sigmoid(2 u)
    small = tl.exp(-tl.abs(u))  # never infinite
    act = g * tl.where(u > 0, 1.0, small) / (1.0 + small)
    return act.to(gate.dtype).to(tl.float32) * up.to(tl.float32)


@triton.jit
def silu_mul_kernel(
    gate_up_ptr, out_ptr, stride_gt, stride_ot,
    F: tl.constexpr, BLOCK: tl.constexpr, IS_GELU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    pointers = gate_up_ptr + row * stride_gt + columns
    gate = tl.load(pointers, mask=inside, other=0.0)
    up = tl.load(pointers + F, mask=inside, other=0.0)
    product = gated(gate, up, IS_GELU)
    tl.store(out_ptr + row * stride_ot + columns, product.to(gate.dtype), mask=inside)


def silu_mul_triton(gate_up: Tensor, *, out: Tensor, act: str = "silu") -> None:
    """``silu_mul_reference``. Rows may be strided. Allocates nothing.

    Raises ValueError before the launch when a shape, stride or dtype does not fit.
    """
    if act not in _ACTS:
        raise ValueError(f"unknown activation {act!r}; known: {', '.join(_ACTS)}")
    if gate_up.dim() != 2 or out.shape != (gate_up.shape[0], gate_up.shape[1] // 2):
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}, out {tuple(out.shape)}")
    if gate_up.shape[1] % 2 or out.dtype != gate_up.dtype:
        raise ValueError(f"gate_up is {gate_up.dtype} [T, {gate_up.shape[1]}], out {out.dtype}")
    if out.numel() == 0:
        return
    if gate_up.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("rows must be contiguous along the width")
    n_rows, width = out.shape
    block = min(_BLOCK, triton.next_power_of_2(width))
    silu_mul_kernel[(n_rows, triton.cdiv(width, block))](
        gate_up, out, gate_up.stride(0), out.stride(0),
        F=width, BLOCK=block, IS_GELU=_ACTS[act], num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
