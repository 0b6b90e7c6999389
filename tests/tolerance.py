# SPDX-License-Identifier: Apache-2.0
"""The only bound of the numeric tests: how far a kernel's answer may be from reference.ffn's, cell by cell.

It walks the kernel's steps with intervals instead of values: each holds whatever a kernel may have there that
sums float32 products in any order and evaluates activations in float32, or, if asked, in float16 steps where
the contract does. Named roundings are monotone, so an
interval passes one by rounding its ends, and most then shrink to a point: that is what lets the bound see a
single wrong rounding. docs/numerics.md derives every term; tests/test_reference.py catches mutants.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

import reference
from reference.activation import GLU, activate
from reference.ffn import (
    Expert,
    Product,
    accumulate,
    by_row,
    dequantize,
    expand,
    experts,
    high_performance,
    results,
)
from reference.moe import halves_exchanged, shares
from reference.rounding import Array, half_away, multiplier, nearest_even, quantize

UNIT = 2.0**-24  # a float32 rounding is off by at most this much of its result,
TINY = 2.0**-149  # and by less than this when it is subnormal
FLUSHED = 2.0**-126  # what products of bf16 take for zero is less
SPLIT = 2.0**-16  # a float16 is within 2**-8 of the nearest bf16: so much of a product is that of both rests
FLOAT32_LIMIT = float(np.finfo(np.float32).max)
# Roundings that a term of a sum may meet besides the K of the sum: its product, the weight's + offset and
# * scale, the bias; the fifth is room for this file's own float64 arithmetic.
EXTRA_ROUNDINGS = 5
# A float32 x * s(z), s the logistic function: z is within 8 units of itself, each exp within 2 ulp (4 units),
# and at most 4 roundings follow. A relative error of z counts |z| s(-z) times; |x| |z| s(z) s(-z) < |x| / 4.
ACTIVATION_ERROR = 16 * UNIT  # of |act(x)| + |x| / 4
EXP_ERROR = 4 * UNIT
# The same for activations that are rounded to float16 at every step: 2**-11 and 2**-24 are its unit and TINY.
ACTIVATION_ERROR_16 = 16 * 2.0**-11
TINY_16 = 2.0**-24
# Half a step of the numbers from 1 on, and the smallest number, of the dtypes of an NPU's activations.
STEPS = {np.dtype(np.float16): (2.0**-11, 2.0**-24), np.dtype(ml_dtypes.bfloat16): (2.0**-8, 2.0**-133)}
# max |act'|: 1.0998... for t s(t), which fastgelu only stretches, and 1.1289... for both forms of gelu.
SLOPE = {"fastgelu": 1.1, "silu": 1.1, "swiglu": 1.1, "gelu": 1.13, "geglu": 1.13, "gelu_erf": 1.13}


class Interval(NamedTuple):
    """Everything a kernel may have in each cell, as float64.

    Equal ends, both infinite or both NaN included, are certain. An infinite end beside another: the kernel
    may overflow. A sum over such a cell may be anything, NaN included, and is written [-inf, inf].
    """

    low: Array
    high: Array

    @property
    def certain(self) -> Array:
        return (self.low == self.high) | (np.isnan(self.low) & np.isnan(self.high))

    @property
    def known(self) -> Array:
        return self.certain | (np.isfinite(self.low) & np.isfinite(self.high))

    @property
    def middle(self) -> Array:
        return np.where(self.certain, self.low, self.low / 2 + self.high / 2)

    @property
    def radius(self) -> Array:
        return np.where(self.certain, 0, self.high / 2 - self.low / 2)

    @property
    def may_vanish(self) -> Array:
        """Not certain, and 0 is inside: multiplied by an infinity it may be anything."""
        return (self.low < self.high) & (self.low <= 0) & (self.high >= 0)


def _point(value: Array) -> Interval:
    return Interval(value.astype(np.float64), value.astype(np.float64))


def _around(middle: Array, radius: Array, known: Array) -> Interval:
    """middle +- radius where known; a middle that is not finite is certain."""
    radius = np.where(np.isfinite(middle), radius, 0)
    return Interval(np.where(known, middle - radius, -np.inf), np.where(known, middle + radius, np.inf))


def _through(step: Callable[[Array], Array], v: Interval) -> Interval:
    """A monotone step, upwards or downwards."""
    ends = step(v.low).astype(np.float64), step(v.high).astype(np.float64)
    return Interval(np.minimum(*ends), np.maximum(*ends))


class Kernel(NamedTuple):
    """What a kernel may do beyond summing float32 products in any order.

    stepwise: evaluate activations in float16 steps where the contract does, as an NPU. flushes: multiply bf16
    with instructions that take subnormals for zero. splits: float16 as two bf16 by these, without the product
    of both rests. composed: of ffn.moe, an NPU's, by this route of ffn_ops/npu.py: results of experts and
    weights are rounded to y's dtype, and each step of the sum to float16 where that is it; "grouped" rounds
    the first product to x's dtype too, and what the activation is made of.
    """

    stepwise: bool = False
    flushes: bool = False
    splits: bool = False
    composed: str = ""


PLAIN = Kernel()


def bound(*args: Any, kernel: Kernel = PLAIN, **kwargs: Any) -> Array:
    """The largest admissible |kernel - reference.ffn(...)| of each cell, as float64; same arguments as that.

    An infinity counts as the power of two after y's largest finite value. A bound of inf allows anything, NaN
    too; where the reference is NaN, 0 asks for NaN.
    """
    return _reference_and_bound(kernel, *args, **kwargs)[1]


@np.errstate(all="ignore")
def assert_close(actual: Array, *args: Any, kernel: Kernel = PLAIN, **kwargs: Any) -> None:
    """Asserts |actual - reference.ffn(...)| <= bound(...) in every cell; reports the worst one."""
    _assert_within(actual, *_reference_and_bound(kernel, *args, **kwargs))


@np.errstate(all="ignore")
def assert_moe_close(actual: Array, *args: Any, kernel: Kernel = PLAIN, **kwargs: Any) -> None:
    """assert_close for reference.moe."""
    _assert_within(actual, *_moe_reference_and_bound(kernel, *args, **kwargs))


def _assert_within(actual: Array, expected: Array, limit: Array) -> None:
    assert actual.dtype == expected.dtype, f"y is {actual.dtype}, but the reference's is {expected.dtype}"
    assert actual.shape == expected.shape, f"y is {actual.shape}, but the reference's is {expected.shape}"
    got, wanted = _on_line(actual, actual.dtype), _on_line(expected, actual.dtype)
    distance = np.abs(got - wanted)
    bad = ~((distance <= limit) | (np.isnan(got) & np.isnan(wanted)) | (limit == np.inf))
    if bad.any():
        excess = np.where(bad, np.nan_to_num(distance - limit, nan=np.inf), -np.inf)
        cell = np.unravel_index(np.argmax(excess), excess.shape)
        raise AssertionError(
            f"y{[int(i) for i in cell]} is {actual[cell]}, but the reference has {expected[cell]} and the "
            f"bound is {limit[cell]:.3g} ({bad.sum()} of {bad.size} cells are beyond theirs)"
        )


@np.errstate(all="ignore")
def _reference_and_bound(kernel: Kernel, *args: Any, **kwargs: Any) -> tuple[Array, Array]:
    expected = reference.ffn(*args, **kwargs)
    call = inspect.signature(reference.ffn).bind(*args, **kwargs)
    call.apply_defaults()
    of = call.arguments
    activation = of["activation"].lower()
    high_precision = of["inner_precise"] == 0 or (of["inner_precise"] is None and activation not in GLU)
    first, second = (Product(*(of[f"{name}{i}"] for name in Product._fields)) for i in (1, 2))
    y = expected.reshape(int(np.prod(expected.shape[:-1])), expected.shape[-1])
    x = of["x"].reshape(len(y), of["x"].shape[-1])
    limit = np.zeros(y.shape)
    for expert in experts(
        first, second, of["scale"], of["offset"], of["expert_tokens"], of["tokens_index_flag"], len(y)
    ):
        if len(expert.second.weight):  # without a second product, y is a bias, bit for bit
            result = _results(x[expert.rows], expert, activation, 0 if high_precision else 1, y.dtype, kernel)
            limit[expert.rows] = _distance(result, y[expert.rows])
    return expected, limit.reshape(expected.shape)


def _moe_reference_and_bound(
    kernel: Kernel,
    x: Array,
    topk_ids: Array,
    topk_weights: Array,
    weight1: Array,
    weight2: Array,
    activation: str,
    inner_precise: int | None = None,
    output_dtype: npt.DTypeLike | None = None,
    activate_left: bool = False,
    **operands: Array,
) -> tuple[Array, Array]:
    expected = reference.moe(
        x, topk_ids, topk_weights, weight1, weight2, activation, inner_precise=inner_precise,
        output_dtype=output_dtype, activate_left=activate_left, **operands,
    )  # fmt: skip
    activation = activation.lower()
    if activate_left and activation in GLU:
        weight1, operands = halves_exchanged(weight1, operands)
    if inner_precise is None:
        inner_precise = 1 if activation in GLU else 0
    y = expected.reshape(int(np.prod(expected.shape[:-1])), expected.shape[-1])
    matrix = x.reshape(len(y), x.shape[-1])
    low, high = np.zeros(y.shape), np.zeros(y.shape)
    narrow = bool(kernel.composed) and y.dtype == np.float16
    for tokens, expert, weight in shares(len(y), topk_ids, topk_weights, weight1, weight2, operands):
        options = (activation, inner_precise, y.dtype)
        if kernel.composed == "grouped":
            one_step = activation == "swiglu" and activate_left  # npu_swiglu
            result = _grouped_results(matrix[tokens], expert, activation, one_step)
        elif len(expert.second.weight):
            result = _results(matrix[tokens], expert, *options, kernel)
        else:
            result = _point(results(matrix[tokens], expert, *options))
        if kernel.composed:
            result = _nearest(result, y.dtype)
            weight = nearest_even(weight, y.dtype)
        weighted = _times(_point(np.broadcast_to(weight, result.low.shape)), result)
        before = Interval(low[tokens], high[tokens])
        total = _plus(before, _nearest(weighted, np.float16) if narrow else weighted)
        low[tokens], high[tokens] = _nearest(total, np.float16) if narrow else total
    return expected, _distance(Interval(low, high), y).reshape(expected.shape)


def _on_line(y: Array, dtype: npt.DTypeLike) -> Array:
    end = 2.0**16 if dtype == np.float16 else 2.0**128
    return np.clip(y.astype(np.float64), -end, end)


def _distance(kernel: Interval, y: Array) -> Array:
    """How far from y a kernel may be that has this before it rounds to y's dtype."""
    kernel = _through(lambda v: nearest_even(v, y.dtype), kernel)
    low, middle, high = (_on_line(v, y.dtype) for v in (kernel.low, y, kernel.high))
    distance = np.maximum(high - middle, middle - low)
    distance = np.where(np.isnan(low) & np.isnan(middle) & np.isnan(high), 0, distance)
    return np.where((kernel.low == -np.inf) & (kernel.high == np.inf), np.inf, distance)


def _results(
    x: Array, expert: Expert, activation: str, inner_precise: int, dtype: npt.DTypeLike, kernel: Kernel
) -> Interval:
    """What a kernel may have before it rounds to y's dtype; step for step as reference.ffn's results."""
    if x.dtype == np.int8:
        return _int8_results(x, expert, activation, dtype, kernel.stepwise)
    acc = _product(_point(x), expert.first, x.dtype, kernel)
    rounded_before = high_performance(x, expert.first, inner_precise)
    if rounded_before:
        acc = _through(lambda v: nearest_even(v, np.float16), acc)
    if activation in GLU:
        left, right = (Interval(*ends) for ends in zip(*(np.split(v, 2, axis=-1) for v in acc), strict=True))
        h = _times(left, _activation(right, activation))
    else:
        h = (_stepwise if kernel.stepwise and rounded_before else _activation)(acc, activation)
    ties = nearest_even if activation in GLU or rounded_before or x.dtype == np.float32 else half_away
    h = _through(lambda v: ties(v, x.dtype), h)
    return _product(h, expert.second, x.dtype, kernel)


def _grouped_results(x: Array, expert: Expert, activation: str, one_step: bool) -> Interval:
    """What the route "grouped" may have before it rounds to y's dtype: operators that round what they return,
    of which npu_fast_gelu is steps in x's dtype, the others are float32 inside, and a GLU two of them but for
    npu_swiglu."""
    unit, tiny = STEPS[x.dtype]
    acc = _nearest(_product(_point(x), expert.first, x.dtype, PLAIN), x.dtype)
    if activation in GLU:
        left, right = (Interval(*ends) for ends in zip(*(np.split(v, 2, axis=-1) for v in acc), strict=True))
        gate = _activation(right, activation)
        h = _times(left, gate if one_step else _nearest(gate, x.dtype))
    elif activation == "fastgelu":
        h = _activation(acc, activation, 16 * unit, tiny)
    else:
        h = _activation(acc, activation)
    return _product(_nearest(h, x.dtype), expert.second, x.dtype, PLAIN)


def _nearest(v: Interval, dtype: npt.DTypeLike) -> Interval:
    return _through(lambda ends: nearest_even(ends, dtype), v)


def _int8_results(
    x: Array, expert: Expert, activation: str, dtype: npt.DTypeLike, stepwise: bool
) -> Interval:
    value = dequantize(accumulate(x, expert.first), expert.first)  # bit for bit
    if dtype == np.float16:
        value = nearest_even(value, np.float16)
    if activation in GLU:
        left, right = np.split(value, 2, axis=-1)
        h = _times(_point(left), _activation(_point(right), activation))
    else:
        h = (_stepwise if stepwise and dtype == np.float16 else _activation)(_point(value), activation)
    h = _through(lambda v: nearest_even(v, np.float16), h)
    scale, offset = expert.scale, expert.offset
    assert scale is not None and offset is not None
    q = _through(lambda v: quantize(v.astype(np.float16), scale, offset), h)
    return _through(lambda v: dequantize(v, expert.second), _int32_product(q, expert.second))


def _product(a: Interval, product: Product, dtype: npt.DTypeLike, kernel: Kernel) -> Interval:
    """a W + b in float32, in any order, fused or not; or as `kernel` may."""
    a_middle, a_radius, a_size = a.middle, a.radius, _finite(np.abs(a.middle))
    bias = np.zeros(1) if product.bias is None else product.bias.astype(np.float64)
    if product.antiquant_scale is None:
        w = _point(product.weight)
        gross = terms = _finite(np.abs(w.low))
    else:
        w, gross, terms = _expanded(product, dtype)
    w_middle, w_radius = w.middle, w.radius

    K = len(w_middle)
    size = (a_size + a_radius) @ gross + _finite(np.abs(bias))
    relative = (K + EXTRA_ROUNDINGS) * UNIT
    error = relative / (1 - relative) * size + TINY * (K + (a_size + a_radius).sum(axis=1, keepdims=True))
    if product.antiquant_scale is None:
        # Multiples of one power of two, at most 2**24 of them in all: no order of the sum rounds anything.
        step = np.minimum(_step(a_size, axis=1) * _step(gross, axis=0), _step(_finite(bias)[None], axis=0))
        exact = ~a_radius.any(axis=1, keepdims=True) & (step >= TINY) & (size <= step / UNIT)
        error = np.where(exact, 0, error)
    if (kernel.flushes and dtype == ml_dtypes.bfloat16) or (kernel.splits and dtype == np.float16):
        flushed = K + (a_size + a_radius).sum(axis=1, keepdims=True) + terms.sum(axis=0, keepdims=True)
        error = error + FLUSHED * flushed
        if product.weight.dtype == np.float16:
            error = error + SPLIT * size
    radius = error + a_radius @ gross + (a_size + a_radius) @ w_radius

    largest = np.maximum(
        size, (a_size + a_radius) @ terms
    )  # beyond float32, the order decides what overflows
    undecided = _count(~np.isfinite(a_middle), w.may_vanish) + _count(a.may_vanish, ~np.isfinite(w_middle))
    known = (
        a.known.all(axis=1, keepdims=True)
        & w.known.all(axis=0, keepdims=True)
        & (undecided == 0)
        & (largest < FLOAT32_LIMIT)
    )
    return _around(a_middle @ w_middle + bias, radius, known)


def _finite(v: Array) -> Array:
    return np.where(np.isfinite(v), v, 0)


def _step(v: Array, axis: int) -> Array:
    """The largest power of two that everything along the axis is a multiple of; inf for zeros."""
    mantissa, exponent = np.frexp(v)
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    step = np.where(v == 0, np.inf, np.ldexp((whole & -whole).astype(np.float64), exponent - 53))
    return step.min(axis=axis, keepdims=True, initial=np.inf)


def _count(a: Array, b: Array) -> Array:
    return a.astype(np.float64) @ b.astype(np.float64)


def _expanded(product: Product, dtype: npt.DTypeLike) -> tuple[Interval, Array, Array]:
    """W of antiquant, from unrounded to rounded as in the contract. Then, for kernels that scale after a sum:
    what its roundings are relative to, |scale| (|w| + |offset|), and what may overflow, |w| + |offset|."""
    exact, rounded = expand(product, np.float64), expand(product, dtype).astype(np.float64)
    scale, offset = by_row(product, product.antiquant_scale), by_row(product, product.antiquant_offset)
    terms = np.abs(product.weight.astype(np.float64)) + np.abs(offset.astype(np.float64))
    gross = np.maximum(np.abs(scale.astype(np.float64)) * terms, np.abs(rounded))
    known = np.isfinite(exact) & np.isfinite(rounded)
    return _around((exact + rounded) / 2, np.abs(exact - rounded) / 2, known), _finite(gross), _finite(terms)


def _int32_product(q: Interval, product: Product) -> Interval:
    """q W + b modulo 2**32: exact, so only the doubt about q counts. Where it decides how often that wraps,
    or which infinity a scale makes of it, nothing is known."""
    weight = product.weight.astype(np.float64)
    bias = 0 if product.bias is None else product.bias.astype(np.float64)
    acc, radius = q.middle @ weight + bias, q.radius @ np.abs(weight)
    wraps = np.floor((acc - radius + 2.0**31) / 2.0**32)
    one_wrap = wraps == np.floor((acc + radius + 2.0**31) / 2.0**32)
    assert product.deq_scale is not None
    known = one_wrap & (np.isfinite(multiplier(product.deq_scale)) | (radius == 0))
    return _around(acc - wraps * 2.0**32, radius, known)


def _activation(
    v: Interval, activation: str, relative: float = ACTIVATION_ERROR, tiny: float = TINY
) -> Interval:
    if activation in ("relu", "reglu"):
        return _through(lambda x: activate(x, "relu"), v)
    if activation == "relu2":
        positive = _through(lambda x: activate(x, "relu"), v)
        return _times(positive, positive)
    value = activate(v.middle, activation)
    # 2 * radius: how much more |act(x)| + |x| / 4 may be elsewhere in the interval.
    size = np.abs(value) + np.abs(v.middle) / 4 + 2 * v.radius
    return _around(value, SLOPE[activation] * v.radius + relative * size + 4 * tiny, v.known)


def _stepwise(v: Interval, activation: str) -> Interval:
    """The activation of a float16 in float32, or in the contract's float16 steps."""
    parts = [_activation(v, activation), _steps(v.low, activation), _steps(v.high, activation)]
    # Between two neighbours there is no other float16. Where there is, the bound of any stepwise evaluation.
    between = np.nextafter(v.low.astype(np.float16), np.float16(np.inf)) < v.high
    coarse = _activation(v, activation, ACTIVATION_ERROR_16, TINY_16)
    parts.append(Interval(*(np.where(between, c, p) for c, p in zip(coarse, parts[0], strict=True))))
    low, high = (np.stack(ends) for ends in zip(*parts, strict=True))
    return Interval(np.fmin.reduce(low), np.fmax.reduce(high))


def _steps(x: Array, activation: str) -> Interval:
    """The contract's float16 steps from x, with any exp that is within EXP_ERROR before it is rounded. Every
    later step is monotone in each exp."""
    x = x.astype(np.float16)
    if activation == "relu":
        return _point(activate(x, activation))

    def exp(z: Array, error: float) -> Array:
        return nearest_even(np.exp(z.astype(np.float64)) * (1 + error), np.float16)

    one, zero = np.float16(1), np.float16(0)
    ends = []
    for error in (-EXP_ERROR, EXP_ERROR):
        if activation == "gelu":
            z = np.float16(1.5957691216057308) * (x + np.float16(0.044715) * (x * x * x))
            ends.append(x / (one + exp(-np.abs(z), -error)) * exp(np.minimum(z, zero), error))
        else:
            z = np.float16(-1.702) * x if activation == "fastgelu" else -x
            ends.append(x / (one + exp(z, error)))
    return Interval(np.minimum(*ends).astype(np.float64), np.maximum(*ends).astype(np.float64))


def _times(a: Interval, b: Interval) -> Interval:
    return _rounded(a, b, a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high)


def _plus(a: Interval, b: Interval) -> Interval:
    return _rounded(a, b, a.low + b.low, a.high + b.high)


def _rounded(a: Interval, b: Interval, *cases: Array) -> Interval:
    """The float32 results between these, of an operation on a and b."""
    ends = np.stack(cases)
    low, high = ends.min(axis=0), ends.max(axis=0)
    radius = (high - low) / 2 + UNIT * np.maximum(np.abs(low), np.abs(high)) + TINY
    return _around(low / 2 + high / 2, radius, np.isfinite(ends).all(axis=0) | (a.certain & b.certain))
