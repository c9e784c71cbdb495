"""Values and codes of e4m3 (OCP "fn": no infinity, largest 448), by arithmetic on any GPU.

    float32 bits of value · 2⁻¹²⁰  =  sign | 0000 | the seven bits of the code | zeros

The product moves the exponents of float32 to those of e4m3, also of subnormals.
"""

import triton
import triton.language as tl

_BIAS = tl.constexpr(2.0**120)  # 127 − 7: difference of the exponents of float32 and e4m3
_LARGEST = tl.constexpr(448.0)


@triton.jit
def e4m3_values(codes):
    """Return the float32 values of uint8 codes."""
    wide = codes.to(tl.int32)
    bits = ((wide & 0x7F) << 20) | ((wide & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * _BIAS


@triton.jit
def e4m3_codes(x):
    """Return the uint8 codes of floats, rounded to nearest even; larger values become ±448."""
    wide = x.to(tl.float32)
    bits = (tl.minimum(tl.abs(wide), _LARGEST) * (1.0 / _BIAS)).to(tl.int32, bitcast=True)
    code = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    return (code | ((wide.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)
