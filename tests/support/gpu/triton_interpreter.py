"""Corrects results of Triton's CPU interpreter that are wrong or have no fixed order.

The interpreter of Triton 3.6 to 3.9 multiplies bf16 operands of ``tl.dot`` as raw 16-bit integers,
truncates float32 → bf16 instead of rounding to nearest even, and sends ``tl.dot`` to BLAS, whose
order of summation depends on the number of rows. A tensor core has one order for every element; so
has the product here: k ascending.

It also patches the language anew at each call of a device function, which a kernel's start has done
already and which takes a fourth of the time: here the call is only a call. The sums by XOR of
``tl.sort`` are NumPy's, since the interpreter takes their elements one by one in Python.
"""

from types import SimpleNamespace

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter


def mend_interpreter() -> None:
    """Replace casts, products, XOR sums and calls of the interpreter. Needs TRITON_INTERPRET=1."""
    builder = interpreter.InterpreterBuilder
    cast_before, convert_before = builder.cast_impl, builder.create_fp_to_fp

    def cast(self, src, dst_type):  # type: ignore[no-untyped-def]
        mended = _bf16_cast(src, dst_type)
        return cast_before(self, src, dst_type) if mended is None else mended

    def convert(self, src, dst_type, rounding_mode):  # type: ignore[no-untyped-def]
        mended = _bf16_cast(src, dst_type)
        return convert_before(self, src, dst_type, rounding_mode) if mended is None else mended

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        left, right = _wide(a), _wide(b)
        products = left[:, :, None] * right[None, :, :]
        total = d.data + products.sum(axis=1)  # over a middle axis NumPy adds in order, k ascending
        return interpreter.TensorHandle(total, d.dtype.scalar)

    def call(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return self.rewrite()(*args, **kwargs)

    def reduce(self, input):  # type: ignore[no-untyped-def]
        if self.combine_fn is not tl.standard._xor_combine:
            return reduce_before(self, input)
        data = np.bitwise_xor.reduce(input[0].handle.data, self.axis, keepdims=self.keep_dims)
        return [self.to_tensor(data, input[0].dtype)]

    reduce_before = interpreter.ReduceOps.generic_reduce
    interpreter.ReduceOps.generic_reduce = reduce
    builder.cast_impl = cast
    builder.create_fp_to_fp = convert
    builder.create_dot = dot
    # Kernels name the language, Triton's own functions its core.
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    patch_before = interpreter._patch_lang
    interpreter._patch_lang = lambda fn: patch_before(both)
    interpreter.InterpretedFunction.__call__ = call


def _bf16_cast(src, dst_type):  # type: ignore[no-untyped-def]
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.bfloat16 and target == tl.float32:
        return interpreter.TensorHandle(_from_bf16(src.data), target)
    if source == tl.float32 and target == tl.bfloat16:
        return interpreter.TensorHandle(_to_bf16(src.data), target)
    return None


def _wide(handle) -> NDArray[np.float32]:  # type: ignore[no-untyped-def]
    if handle.dtype.scalar == tl.bfloat16:
        return _from_bf16(handle.data)
    return np.asarray(handle.data, dtype=np.float32)


def _from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)
