# SPDX-License-Identifier: Apache-2.0
"""The activations, evaluated in the dtype of their argument: every step and every constant is rounded to it.

float16 gives the vendor's stepwise float16 evaluation, float32 its float32 one, float64 the formula itself.
A GLU's entry is what its right half goes through.
"""

import math
from collections.abc import Callable

import numpy as np

from reference.rounding import Array

GLU = ("geglu", "swiglu", "reglu")


def activate(x: Array, activation: str) -> Array:
    return FORMULAS[activation](x)


def _exp(x: Array) -> Array:
    # Through float64: the nearest value of the dtype on every machine, which NumPy's own float32 exp is not.
    return np.exp(x.astype(np.float64)).astype(x.dtype)


_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _fastgelu(x: Array) -> Array:
    real = x.dtype.type
    return x / (real(1) + _exp(real(-1.702) * x))


def _gelu(x: Array) -> Array:
    real = x.dtype.type
    z = real(1.5957691216057308) * (x + real(0.044715) * (x * x * x))
    return x / (real(1) + _exp(-np.abs(z))) * _exp(np.minimum(z, real(0)))


def _gelu_erf(x: Array) -> Array:
    # No vendor describes steps in a narrower dtype, so it is one: the formula in float64, rounded.
    wide = x.astype(np.float64)
    return (wide * 0.5 * _erfc(-wide / math.sqrt(2))).astype(x.dtype)


def _relu2(x: Array) -> Array:
    return _relu(x) * _relu(x)


def _relu(x: Array) -> Array:
    return np.maximum(x, x.dtype.type(0))


def _silu(x: Array) -> Array:
    return x / (x.dtype.type(1) + _exp(-x))


def _geglu_gate(x: Array) -> Array:
    real = x.dtype.type
    return x / (real(1) + _exp(real(-0.0713548162726) * x * (x * x + real(22.363860002236))))


FORMULAS: dict[str, Callable[[Array], Array]] = {
    "fastgelu": _fastgelu,
    "gelu": _gelu,
    "relu": _relu,
    "silu": _silu,
    "gelu_erf": _gelu_erf,
    "relu2": _relu2,
    "geglu": _geglu_gate,
    "swiglu": _silu,
    "reglu": _relu,
}
