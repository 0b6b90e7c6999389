# SPDX-License-Identifier: Apache-2.0
"""y = act(x W1 + b1) W2 + b2 in every mode.

Start at `ffn`; `results` rounds at every step, `exact_results` never. tests/tolerance.py
walks the same experts to bound how far a kernel may be from this; docs/numerics.md has the table of rounding
steps.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from reference.activation import GLU, activate
from reference.rounding import (
    ALL_32_BITS,
    BFLOAT16,
    TOP_19_BITS,
    Array,
    half_away,
    multiplier,
    nearest_even,
    quantize,
)


class Product(NamedTuple):
    """What one of the two products of one expert reads."""

    weight: Array  # [K, N]
    bias: Array | None  # [N]
    deq_scale: Array | None  # [N] or [1, N]
    antiquant_scale: Array | None  # [N] or [G, N]
    antiquant_offset: Array | None


class Expert(NamedTuple):
    rows: slice  # of x and y as matrices
    first: Product
    second: Product
    scale: Array | None  # one value or [K2]
    offset: Array | None  # one value


@np.errstate(all="ignore")
def ffn(
    x: Array,
    weight1: Array,
    weight2: Array,
    activation: str,
    expert_tokens: Array | None = None,
    bias1: Array | None = None,
    bias2: Array | None = None,
    scale: Array | None = None,
    offset: Array | None = None,
    deq_scale1: Array | None = None,
    deq_scale2: Array | None = None,
    antiquant_scale1: Array | None = None,
    antiquant_scale2: Array | None = None,
    antiquant_offset1: Array | None = None,
    antiquant_offset2: Array | None = None,
    *,
    tokens_index_flag: bool = False,
    inner_precise: int | None = None,
    output_dtype: npt.DTypeLike | None = None,
    rounding: Literal["ascend", "exact"] = "ascend",
) -> Array:
    """The operator. Rows that no expert owns are zero. rounding="exact" is the formula, in and as float64."""
    activation = activation.lower()
    if inner_precise is None:
        inner_precise = 1 if activation in GLU else 0
    dtype = np.dtype(output_dtype or (np.float16 if x.dtype == np.int8 else x.dtype))
    matrix = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
    y = np.zeros((len(matrix), weight2.shape[-1]), np.float64 if rounding == "exact" else dtype)
    for expert in experts(
        Product(weight1, bias1, deq_scale1, antiquant_scale1, antiquant_offset1),
        Product(weight2, bias2, deq_scale2, antiquant_scale2, antiquant_offset2),
        scale, offset, expert_tokens, tokens_index_flag, len(matrix),
    ):  # fmt: skip
        rows = matrix[expert.rows]
        if rounding == "exact":
            y[expert.rows] = exact_results(rows, expert, activation)
        else:
            y[expert.rows] = _round_y(
                results(rows, expert, activation, inner_precise, dtype), expert.second, dtype
            )
    return y.reshape(*x.shape[:-1], weight2.shape[-1])


def experts(
    first: Product,
    second: Product,
    scale: Array | None,
    offset: Array | None,
    expert_tokens: Array | None,
    tokens_index_flag: bool,
    M: int,
) -> Iterator[Expert]:
    """The experts that have rows, each with its slice of every operand; a dense call is one expert."""
    if expert_tokens is None or len(expert_tokens) == 0:
        yield Expert(slice(0, M), first, second, scale, offset)
        return

    def of(e: int, operand: Array | None) -> Array | None:
        return None if operand is None else operand[e]

    ends = [int(end) for end in (expert_tokens if tokens_index_flag else np.cumsum(expert_tokens))]
    assert ends[-1] <= M and all(begin <= end for begin, end in pairwise([0, *ends]))
    for e, (begin, end) in enumerate(pairwise([0, *ends])):
        if begin < end:
            one, two = (Product(p.weight[e], *(of(e, operand) for operand in p[1:])) for p in (first, second))
            yield Expert(slice(begin, end), one, two, of(e, scale), of(e, offset))


def results(x: Array, expert: Expert, activation: str, inner_precise: int, dtype: npt.DTypeLike) -> Array:
    """What y's rows are before they are rounded to its dtype: float32."""
    if len(expert.second.weight) == 0:
        return np.broadcast_to(_bias_only(expert.second), (len(x), expert.second.weight.shape[1]))
    acc = accumulate(x, expert.first)
    if x.dtype == np.int8:
        value = dequantize(acc, expert.first)
        if dtype == np.float16:
            value = nearest_even(value, np.float16)
        if activation in GLU:
            left, right = np.split(value.astype(np.float32), 2, axis=-1)
            h = nearest_even(left * activate(right, activation), np.float16)
        else:
            h = nearest_even(activate(value, activation), np.float16)  # float16 step by step where value is
        assert expert.scale is not None and expert.offset is not None
        q = quantize(h, expert.scale, expert.offset)
        return dequantize(accumulate(q, expert.second), expert.second)

    if high_performance(x, expert.first, inner_precise):
        acc = nearest_even(acc, np.float16)
    if activation in GLU:
        left, right = np.split(acc.astype(np.float32), 2, axis=-1)
        h = nearest_even(left * activate(right, activation), x.dtype)
    elif acc.dtype == x.dtype:  # float16 step by step, or float32
        h = activate(acc, activation)
    else:
        h = half_away(activate(acc, activation), x.dtype)
    return accumulate(h, expert.second)


def _round_y(value: Array, second: Product, dtype: npt.DTypeLike) -> Array:
    if len(second.weight) == 0 and second.deq_scale is None and dtype == BFLOAT16:
        return half_away(value, dtype)
    return nearest_even(value, dtype)


def high_performance(x: Array, first: Product, inner_precise: int) -> bool:
    """Whether the first product is rounded to float16 before the activation."""
    return x.dtype == np.float16 and (inner_precise == 1 or first.antiquant_scale is not None)


def accumulate(x: Array, product: Product) -> Array:
    """x W + b: wrapping int32 for int8 x, else the float32 nearest to the sum (its order is unspecified)."""
    weight = product.weight if product.antiquant_scale is None else expand(product, x.dtype)
    acc = x.astype(np.float64) @ weight.astype(np.float64)  # exact for integers: K * 2**14 < 2**53
    if x.dtype == np.int8:
        whole = acc.astype(np.int64)
        return (whole if product.bias is None else whole + product.bias).astype(np.int32)
    return (acc if product.bias is None else acc + product.bias).astype(np.float32)


def dequantize(acc: Array, product: Product) -> Array:
    assert product.deq_scale is not None
    return acc.astype(np.float32) * multiplier(product.deq_scale)


def expand(product: Product, dtype: npt.DTypeLike) -> Array:
    """W = (w + offset) * scale in the dtype: float16 rounds at both steps, bfloat16 once, float64 never."""
    scale, offset = by_row(product, product.antiquant_scale), by_row(product, product.antiquant_offset)
    if dtype == BFLOAT16:
        weight = product.weight.astype(np.float32) + offset.astype(np.float32)
        return nearest_even(weight * scale.astype(np.float32), BFLOAT16)
    return (product.weight.astype(dtype) + offset.astype(dtype)) * scale.astype(dtype)


def by_row(product: Product, groups: Array | None) -> Array:
    """[N] or [G, N] as [K, N]: row k belongs to group k // (K / G)."""
    assert groups is not None
    groups = np.atleast_2d(groups)
    return np.repeat(groups, len(product.weight) // len(groups), axis=0)


def _bias_only(second: Product) -> Array:
    """The row that every token gets when N1 == 0. Unlike elsewhere, a deq_scale keeps all its 32 bits."""
    if second.bias is None:
        return np.zeros(second.weight.shape[1], np.float32)
    bias = second.bias.astype(np.float32)
    return bias if second.deq_scale is None else bias * multiplier(second.deq_scale, ALL_32_BITS)


def exact_results(x: Array, expert: Expert, activation: str) -> Array:
    """The formula, in float64."""
    h = _exact_product(x, expert.first, TOP_19_BITS)
    if activation in GLU:
        left, right = np.split(h, 2, axis=-1)
        h = left * activate(right, activation)
    else:
        h = activate(h, activation)
    if expert.scale is not None and expert.offset is not None:
        h = h * expert.scale + expert.offset
    return _exact_product(h, expert.second, TOP_19_BITS if h.shape[-1] else ALL_32_BITS)


def _exact_product(x: Array, product: Product, deq_bits: int) -> Array:
    weight = product.weight.astype(np.float64)
    if product.antiquant_scale is not None:
        weight = expand(product, np.float64)
    acc = x.astype(np.float64) @ weight
    if product.bias is not None:
        acc = acc + product.bias.astype(np.float64)
    return acc if product.deq_scale is None else acc * multiplier(product.deq_scale, deq_bits)
