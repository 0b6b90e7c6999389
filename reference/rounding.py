# SPDX-License-Identifier: Apache-2.0
"""The rounding steps that reference/ffn.py names. What is rounded to 16 bits is a float32 first."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TOP_19_BITS = 0xFFFFE000  # sign, 8 exponent and 10 mantissa bits of a float32: what the dequantizer reads
ALL_32_BITS = 0xFFFFFFFF


def nearest_even(value: Array, dtype: npt.DTypeLike) -> Array:
    """float32, then dtype, both to nearest with ties to even; overflow gives inf."""
    return value.astype(np.float32).astype(dtype)


def half_away(value: Array, dtype: npt.DTypeLike) -> Array:
    """float32, then float16 or bfloat16 to nearest with ties away from zero; overflow gives inf."""
    info = ml_dtypes.finfo(dtype)
    exact = value.astype(np.float32).astype(np.float64)
    _, exponent = np.frexp(exact)  # |exact| is in [1/2, 1) * 2**exponent
    quantum = np.ldexp(1.0, np.maximum(exponent - 1, info.minexp) - info.nmant)  # one subnormal step at least
    return np.copysign(np.floor(np.abs(exact) / quantum + 0.5) * quantum, exact).astype(dtype)


def multiplier(deq_scale: Array, bits: int = TOP_19_BITS) -> Array:
    """What a deq_scale multiplies by, as float32: the `bits` kept of a float32 or of the low half of a 64-bit
    integer; all of a bfloat16."""
    if deq_scale.dtype == BFLOAT16:
        return deq_scale.astype(np.float32)
    pattern = deq_scale.view(np.uint32) if deq_scale.dtype == np.float32 else deq_scale.astype(np.uint64)
    return (pattern & pattern.dtype.type(bits)).astype(np.uint32).view(np.float32)


def quantize(value: Array, scale: Array, offset: Array) -> Array:
    """float16 to int8: a float16 rounding after scale and after offset, ties to even, saturated; NaN is 0."""
    shifted = value * scale.astype(np.float16) + offset.astype(np.float16)
    return np.where(np.isnan(shifted), 0, np.clip(np.rint(shifted), -128, 127)).astype(np.int8)
