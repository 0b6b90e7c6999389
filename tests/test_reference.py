# SPDX-License-Identifier: Apache-2.0
"""The reference against numbers worked out by hand, and the bound (tests/tolerance.py) against kernels, right
and wrong: emulated ones in float32 must keep it, mutants must break it."""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerance import ACTIVATION_ERROR, EXP_ERROR, SLOPE, Kernel, assert_close, bound

import reference
from reference.activation import FORMULAS, GLU, activate
from reference.ffn import Product, accumulate, by_row
from reference.rounding import ALL_32_BITS, Array, half_away, multiplier, nearest_even, quantize

F16, F32, BF16, I8, I4 = np.float16, np.float32, ml_dtypes.bfloat16, np.int8, ml_dtypes.int4
steps = importlib.import_module("reference.ffn")  # the module; reference.ffn is its function
formulas = importlib.import_module("reference.activation")


def call(
    dtype: Any, x: Any, weight1: Any, weight2: Any, weight_dtype: Any = None, **operands: Any
) -> dict[str, Any]:
    """A call with literals; each operand's dtype is the one that goes with x's."""
    bias = {F16: F16, I8: np.int32}.get(dtype, F32)
    kinds = {"bias1": bias, "bias2": bias, "scale": F32, "offset": F32, "expert_tokens": np.int64}
    given = {
        name: np.array(value, kinds.get(name, dtype)) if isinstance(value, list) else value
        for name, value in operands.items()
    }
    weights = (np.array(w, weight_dtype or dtype) for w in (weight1, weight2))
    return {"x": np.array(x, dtype), **dict(zip(("weight1", "weight2"), weights, strict=True)), **given}


def answer(*args: Any, **operands: Any) -> Any:
    return reference.ffn(**call(*args, **operands)).astype(np.float64).tolist()


# Rounding


@pytest.mark.parametrize(
    ("dtype", "value", "even", "away"),
    [
        (F16, 1 + 2**-11, 1, 1 + 2**-10),
        (F16, -(1 + 2**-11), -1, -(1 + 2**-10)),
        (F16, 1 + 3 * 2**-11, 1 + 2**-9, 1 + 2**-9),
        (F16, 1 + 2**-11 - 2**-23, 1, 1),
        (F16, 2**-25, 0, 2**-24),  # half of the smallest subnormal
        (F16, 3 * 2**-25, 2**-23, 2**-23),
        (F16, 2**-25 - 2**-49, 0, 0),
        (F16, 65519, 65504, 65504),
        (F16, 65520, np.inf, np.inf),
        (F16, -np.inf, -np.inf, -np.inf),
        (BF16, 1 + 2**-8, 1, 1 + 2**-7),
        (BF16, 2**-134, 0, 2**-133),
        (BF16, 2.0**128 - 2.0**119, np.inf, np.inf),
    ],
)
@np.errstate(over="ignore")
def test_ties_go_to_even_or_away_from_zero(dtype: Any, value: float, even: float, away: float) -> None:
    assert float(nearest_even(np.array(value), dtype)) == even
    assert float(half_away(np.array(value), dtype)) == away


def test_deq_scale_keeps_its_top_19_bits() -> None:
    one_and_all_below = np.array([0x3F801FFF, 0x3F803FFF, 0xBF801FFF], np.uint64)
    everything_else = np.uint64(0xFFFFFFFF_00000000)  # bit 46, the 9-bit offset and what nobody names
    for packed in (one_and_all_below, one_and_all_below | everything_else):
        assert (
            multiplier(packed).tolist() == multiplier(packed.astype(np.int64)).tolist() == [1, 1 + 2**-10, -1]
        )
    assert multiplier(np.array([1 + 2**-11], F32)) == 1
    assert multiplier(np.array([1 + 2**-7], BF16)) == 1 + 2**-7


@pytest.mark.parametrize(
    ("value", "scale", "offset", "q"),
    [
        (0.5, 1, 0, 0), (1.5, 1, 0, 2), (-1.5, 1, 0, -2), (300, 1, 0, 127), (-300, 1, 0, -128),
        (np.nan, 1, 0, 0), (np.inf, 1, 0, 127), (np.inf, 0, 0, 0), (np.inf, 1, -np.inf, 0),
        (60000, 1e-8, 5, 5),  # 1e-8 is below half of float16's smallest, so it is 0
        (1, 1e6, 0, 127),  # 1e6 is infinite in float16
        (0.46875, 1, 101, 102),  # 101.46875 is halfway between 101.4375 and 101.5, and then 101.5 is a tie
        (3, 0.1, 0.7, 1),  # 0.1 and 0.7 in float16 give 0.29992676, then 1.0
    ],
)  # fmt: skip
@np.errstate(all="ignore")
def test_quantize_rounds_twice_and_saturates(value: float, scale: float, offset: float, q: int) -> None:
    assert quantize(np.array([value], F16), np.array([scale], F32), np.array([offset], F32)) == q


# The modes, by hand. One number for each size unless a rounding needs more.


def test_float32_rounds_nothing_in_between() -> None:
    assert answer(F32, [[2]], [[3]], [[0.5]], activation="relu", bias1=[-1], bias2=[0.25]) == [[2.75]]
    assert answer(F32, [[1 + 2**-23]], [[1]], [[1]], activation="relu") == [[1 + 2**-23]]


def test_fp16_rounds_the_first_product_or_the_activation() -> None:
    tie = (F16, [[1, 2**-11]], [[1], [1]], [[1, 1]])  # the first product is 1 + 2**-11
    assert answer(*tie, activation="relu", inner_precise=1) == [[1, 1]]
    assert answer(*tie, activation="relu", inner_precise=0) == [[1 + 2**-10] * 2]
    assert answer(*tie, activation="ReLU") == [[1 + 2**-10] * 2]
    biased = answer(*tie, activation="relu", inner_precise=1, bias1=[2**-11], bias2=[0.5, -2])
    assert biased == [[1.5 + 2**-10, -1 + 2**-10]]  # the bias is in the sum before it is rounded


def test_fp16_high_performance_evaluates_silu_step_by_step() -> None:
    # silu(2) = 1.76159; in float16 exp(-2) = 1109/8192, 1 + that = 1163/1024, 2 / that = 1803/1024.
    one = (F16, [[2]], [[1]], [[1]])
    assert answer(*one, activation="silu", inner_precise=1) == [[1803 / 1024]]
    assert answer(*one, activation="silu", inner_precise=0) == [[1804 / 1024]]


def test_fp16_overflows_to_infinity() -> None:
    big = (F16, [[60000]], [[2]], [[2**-10]])
    assert answer(*big, activation="relu", inner_precise=1) == [[np.inf]]
    assert answer(F16, [[2**9]], [[2**7]], [[2**-10]], activation="relu", inner_precise=0) == [[np.inf]]
    assert answer(F16, [[65504]], [[1]], [[1]], activation="relu", inner_precise=0, bias2=[16]) == [[np.inf]]


def test_bf16_rounds_the_activation_away_from_zero() -> None:
    tie = (BF16, [[1, 2**-8]], [[1], [1]], [[1, -1]])
    assert answer(*tie, activation="relu") == [[1 + 2**-7, -1 - 2**-7]]
    assert answer(*tie, activation="relu", bias1=[-(2**-16)], bias2=[0, 2.0**-7]) == [[1, -1 + 2**-7]]


def test_glu_multiplies_the_left_half_by_the_activated_right_half() -> None:
    assert answer(F16, [[1]], [[3, -2]], [[1]], activation="reglu") == [[0]]
    assert answer(F16, [[1]], [[-2, 3]], [[1]], activation="reglu", bias1=[1, 1], bias2=[0.5]) == [[-3.5]]
    # (1 + 2**-11) (1 + 2**-10) is just above the tie between 1 + 2**-10 and 1 + 2**-9.
    halves = (F16, [[1, 2**-11]], [[1, 1 + 2**-10], [1, 0]], [[1, 0]])
    assert answer(*halves, activation="reglu") == [[1 + 2**-10, 0]]  # halves rounded before: 1 * (1 + 2**-10)
    assert answer(*halves, activation="reglu", inner_precise=0) == [[1 + 2**-9, 0]]
    # bf16: 1 + 2**-8 is a tie, to even; nothing is rounded before.
    assert answer(BF16, [[1, 2**-8]], [[1, 1], [1, 0]], [[1, 0]], activation="reglu") == [[1, 0]]
    assert answer(F32, [[1]], [[2, 0]], [[1]], activation="swiglu") == [[0]]


def w8a8(**changes: Any) -> dict[str, Any]:
    # (3 * 5 + 1) * 0.5 = 8; 8 * 2 - 1 = 15; (15 * 7 - 5) * 0.25 = 25
    scales: dict[str, Any] = {"scale": [2], "offset": [-1], "bias1": [1], "bias2": [-5], "activation": "relu"}
    deq = {"deq_scale1": np.array([0.5], F32), "deq_scale2": np.array([0.25], F32)}
    return call(I8, [[3]], [[5]], [[7]], **(scales | deq | changes))


def test_w8a8_adds_the_bias_before_it_dequantizes() -> None:
    as_bits = {name: w8a8()[name].view(np.uint32).astype(np.uint64) for name in ("deq_scale1", "deq_scale2")}
    as_bf16 = {name: w8a8()[name].astype(BF16) for name in ("deq_scale1", "deq_scale2")}
    for call_ in (w8a8(), w8a8(**as_bits), w8a8(**as_bf16, output_dtype=BF16), w8a8(scale=[[2.0]])):
        y = reference.ffn(**call_)
        assert y == 25 and y.dtype == call_.get("output_dtype", F16)
    assert reference.ffn(**w8a8(), rounding="exact") == 25
    one_row = {name: w8a8()[name][None] for name in ("deq_scale1", "deq_scale2")}
    assert reference.ffn(**w8a8(**one_row)) == 25


def test_w8a8_rounds_to_float16_where_the_output_is_float16() -> None:
    # 2049 is a tie of float16 and goes to 2048, and 2048 / 4096 is a tie of the integers and goes to 0.
    assert (
        reference.ffn(**w8a8(bias1=[2034], deq_scale1=np.array([1], F32), scale=[2**-12], offset=[0]))
        == -1.25
    )
    assert reference.ffn(**w8a8(bias2=[2049 - 105], deq_scale2=np.array([1], F32))) == 2048
    wide = {"deq_scale1": np.array([0.5], BF16), "deq_scale2": np.array([1], BF16), "output_dtype": BF16}
    assert reference.ffn(**w8a8(bias2=[257 - 105], **wide)) == 256


def test_w8a8_sums_wrap() -> None:
    far = {
        "bias2": [2**31 - 1 - 104],
        "deq_scale2": np.array([2.0**-31], F32),
    }  # one more than an int32 holds
    assert reference.ffn(**w8a8(**far)) == -1
    assert reference.ffn(**w8a8(**far), rounding="exact") == 1


def test_antiquant_adds_the_offset_and_then_scales() -> None:
    for dtype in (F16, BF16):
        for weight in (I8, I4):
            # 2 * ((3 + 1) * 0.5) + 1 = 5; 5 * ((-8 + 2) * 0.25) - 1 = -8.5
            tensors = {"antiquant_offset1": [1], "antiquant_scale1": [0.5]}
            tensors |= {"antiquant_offset2": [2], "antiquant_scale2": [0.25], "bias1": [1], "bias2": [-1]}
            assert answer(dtype, [[2]], [[3]], [[-8]], weight, activation="relu", **tensors) == [[-8.5]]


def test_antiquant_groups_are_contiguous_rows() -> None:
    y = answer(
        F16, [[1, 10, 100, 1000]], [[1, 0]] * 4, [[1, 2, 4, 7], [0, 0, 0, 0]], I8, activation="relu",
        antiquant_scale1=[[1, 1], [0.5, 1]], antiquant_offset1=[[0, 0], [1, 0]],
        antiquant_scale2=[[1, 1, 1, 1]], antiquant_offset2=[[0, 0, 0, 0]],
    )  # fmt: skip
    # 1 + 10 with scale 1, then (1 + 1) * 0.5 * (100 + 1000)
    assert y == [[1111, 2222, 4444, 7776]]  # 7777 to float16's step of 4


def test_antiquant_rounds_the_weight() -> None:
    tensors = {
        "antiquant_scale1": [1],
        "antiquant_scale2": [1],
        "antiquant_offset2": [0],
        "activation": "relu",
    }
    one = (F16, [[1]], [[127]], [[1]], I8)
    assert answer(*one, antiquant_offset1=[2**-5], **tensors) == [[127]]  # a tie of float16's step of 1/16
    assert answer(BF16, *one[1:], antiquant_offset1=[0.75], **tensors) == [[128]]  # of bfloat16's of 1/2
    exact = reference.ffn(**call(*one, antiquant_offset1=[2**-5], **tensors), rounding="exact")
    assert exact == 127 + 2**-5


# Experts, and sizes of zero


def by_expert(tokens: list[int], **flags: Any) -> Any:
    return answer(
        F32, [[1], [1], [1], [1]], [[[1]], [[10]], [[100]]], [[[1]], [[2]], [[3]]], activation="relu",
        expert_tokens=tokens, bias2=[[0], [0.5], [0]], **flags,
    )  # fmt: skip


def test_experts_take_rows_in_order() -> None:
    assert by_expert([1, 0, 3]) == [[1], [300], [300], [300]]
    assert by_expert([1, 1, 4], tokens_index_flag=True) == [[1], [300], [300], [300]]
    assert (
        by_expert([0, 2, 2]) == by_expert([0, 2, 4], tokens_index_flag=True) == [[20.5], [20.5], [300], [300]]
    )


def test_rows_beyond_the_total_are_zero() -> None:
    assert by_expert([1, 1, 0]) == [[1], [20.5], [0], [0]]


def test_no_expert_tokens_is_a_dense_call() -> None:
    assert answer(F32, [[2]], [[3]], [[4]], activation="relu", expert_tokens=[]) == [[24]]


def test_leading_axes_are_kept_and_empty_x_is_empty() -> None:
    eye = np.eye(3, dtype=F32)
    assert reference.ffn(np.ones((2, 1, 3), F32), eye, eye, "relu").shape == (2, 1, 3)
    assert reference.ffn(np.ones((0, 5, 3), F32), eye, eye, "relu").shape == (0, 5, 3)
    assert bound(np.ones((0, 5, 3), F32), eye, eye, "relu").shape == (0, 5, 3)
    nothing = np.ones((2, 0), F32), np.ones((0, 4), F32), np.ones((4, 0), F32), "gelu"
    assert reference.ffn(*nothing).shape == bound(*nothing).shape == (2, 0)


@pytest.mark.parametrize("rounding", ["ascend", "exact"])
def test_without_inner_columns_y_is_bias2(rounding: str) -> None:
    def y(dtype: Any, bias2: Any, **operands: Any) -> Any:
        empty = call(
            dtype, [[1], [2]], np.ones((1, 0)), np.ones((0, 1)), activation="relu", bias2=bias2, **operands
        )
        return reference.ffn(**empty, rounding=rounding)

    exact = rounding == "exact"
    assert y(F16, [0.5]).tolist() == [[0.5], [0.5]] and y(F16, None).tolist() == [[0], [0]]
    assert (y(BF16, [1 + 2**-8]) == (1 + 2**-8 if exact else 1 + 2**-7)).all()
    quant = {"scale": [1], "offset": [0], "deq_scale1": np.ones(0, F32)}
    # All 32 bits count here: 1024 (1 + 3 * 2**-12) = 1024.75; 19 of them would leave 1024.
    assert (
        y(I8, [1024], **quant, deq_scale2=np.array([1 + 3 * 2**-12], F32)) == (1024.75 if exact else 1025)
    ).all()
    packed = np.array([1 + 3 * 2**-12], F32).view(np.uint32).astype(np.int64) | 1 << 46
    assert (y(I8, [1024], **quant, deq_scale2=packed) == (1024.75 if exact else 1025)).all()


def test_nan_and_infinity_follow_the_formula() -> None:
    eye = np.eye(2, dtype=F32)

    def y(value: float, activation: str) -> float:
        with np.errstate(all="ignore"):
            return float(activate(np.array([value], F32), activation)[0])

    for activation in FORMULAS:
        assert np.isnan(y(np.nan, activation)) and y(np.inf, activation) == np.inf
        assert (
            y(-np.inf, activation) == 0
            if activation in ("relu", "reglu", "relu2")
            else np.isnan(y(-np.inf, activation))
        )
        largest = np.inf if activation == "relu2" else np.float32(3e38)
        assert y(-3e38, activation) == 0 and y(3e38, activation) == largest
    rows = np.array([[np.nan, 1], [np.inf, 1], [2, 1]], F32)  # inf * 0 is NaN, so a row is lost and no other
    assert np.isnan(reference.ffn(rows, eye, eye, "relu")).tolist() == [[True] * 2, [True] * 2, [False] * 2]
    to_int8 = {"weight1": np.array([[0]], I8), "deq_scale1": np.array([np.inf], F32)}
    assert reference.ffn(**(w8a8(bias1=None) | to_int8)) == -1.25  # 0 * inf, then Q makes 0 of NaN: -5 * 0.25


# The bound

MODES = {  # name: dtypes of x, weights and y
    "float32": (F32, F32, F32), "fp16": (F16, F16, F16), "bf16": (BF16, BF16, BF16),
    "w8a8": (I8, I8, F16), "w8a8_bf16": (I8, I8, BF16),
    "w8a16": (F16, I8, F16), "w8a16_bf16": (BF16, I8, BF16),
    "w4a16": (F16, I4, F16), "w4a16_bf16": (BF16, I4, BF16),
}  # fmt: skip


def random_call(
    mode: str, activation: str, *, M: int = 8, K: int = 16, N: int = 12, E: int = 0, G: int = 0,
    seed: int = 0, magnitude: float = 1, dyadic: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A call with every operand. `dyadic` values are small multiples of a power of two: their float sums are
    exact, and often ties of the 16-bit dtypes."""
    rng = np.random.default_rng(seed)
    x_dtype, weight_dtype, y_dtype = MODES[mode]
    experts = (E,) if E else ()

    def floats(dtype: Any, shape: tuple[int, ...], size: float) -> Array:
        value = rng.integers(-31, 32, shape) / 16 if dyadic else rng.normal(size=shape)
        with np.errstate(over="ignore"):
            return (value * size).astype(dtype)

    def weights(shape: tuple[int, ...]) -> Array:
        if weight_dtype in (I8, I4):
            most = int(ml_dtypes.iinfo(weight_dtype).max)
            return rng.integers(-most - 1, most + 1, (*experts, *shape)).astype(weight_dtype)
        return floats(weight_dtype, (*experts, *shape), 0.25)

    K2 = N // 2 if activation in GLU else N
    x = rng.integers(-128, 128, (M, K)).astype(I8) if x_dtype == I8 else floats(x_dtype, (M, K), magnitude)
    made: dict[str, Any] = {
        "x": x,
        "weight1": weights((K, N)),
        "weight2": weights((K2, K)),
        "activation": activation,
    }
    if E:
        made["expert_tokens"] = rng.multinomial(M, [1 / E] * E)
    for i, columns in ((1, N), (2, K)):
        if x_dtype == I8:
            made[f"bias{i}"] = rng.integers(-5000, 5000, (*experts, columns)).astype(np.int32)
            deq = BF16 if y_dtype == BF16 else F32
            made[f"deq_scale{i}"] = (rng.uniform(2**-12, 2**-10, (*experts, columns))).astype(deq)
        else:
            made[f"bias{i}"] = floats(F16 if x_dtype == F16 else F32, (*experts, columns), 1)
        if x_dtype != weight_dtype:
            shape = (*experts, *((G,) if G else ()), columns)
            made[f"antiquant_scale{i}"] = floats(x_dtype, shape, 2**-5)
            made[f"antiquant_offset{i}"] = floats(x_dtype, shape, 4)
    if x_dtype == I8:
        made["scale"] = rng.uniform(3, 12, experts or 1).astype(F32)
        made["offset"] = rng.uniform(-9, 9, experts or 1).astype(F32)
        made["output_dtype"] = y_dtype
    return made


def term_by_term(x: Array, product: Product) -> Array:
    """A float32 product that starts at 0, rounds each product and each sum, and expands antiquant weights."""
    if x.dtype == I8:
        return accumulate(x, product)
    weight = product.weight.astype(F32)
    if product.antiquant_scale is not None:
        weight = weight + by_row(product, product.antiquant_offset).astype(F32)
        weight = weight * by_row(product, product.antiquant_scale).astype(F32)
    acc = np.zeros((len(x), weight.shape[1]), F32)
    for k in range(len(weight)):
        acc = acc + x[:, k : k + 1].astype(F32) * weight[k]
    return acc if product.bias is None else acc + product.bias.astype(F32)


def fused_in_blocks(x: Array, product: Product) -> Array:
    """A float32 product that starts at the bias and adds blocks, each summed backwards, multiply-adds fused,
    with the antiquant scale applied to a whole block."""
    if x.dtype == I8:
        return accumulate(x, product)
    weight, scale, block = product.weight.astype(F32), np.ones(product.weight.shape, F32), 3
    if product.antiquant_scale is not None:
        weight = weight + by_row(product, product.antiquant_offset).astype(F32)
        scale = by_row(product, product.antiquant_scale).astype(F32)
        block = len(weight) // len(np.atleast_2d(product.antiquant_scale))
    acc = np.zeros((len(x), weight.shape[1]), F32)
    if product.bias is not None:
        acc = acc + product.bias.astype(F32)
    for start in range(0, len(weight), block):
        part = np.zeros_like(acc)
        for k in reversed(range(start, min(start + block, len(weight)))):
            part = (x[:, k : k + 1].astype(np.float64) * weight[k] + part).astype(F32)
        acc = acc + part * scale[start]
    return acc


@contextlib.contextmanager
def kernel(product: Callable[[Array, Product], Array], exp_error: float | None = None) -> Iterator[None]:
    """Inside, reference.ffn sums in float32 with `product`, and evaluates every activation in float32, or,
    given an exp_error, in its own steps with an exp that is off by that."""

    def in_float32(x: Array, activation: str) -> Array:
        return activate(x.astype(F32), activation).astype(x.dtype)

    def exp(x: Array) -> Array:
        return nearest_even(np.exp(x.astype(np.float64)) * (1 + exp_error), x.dtype)

    if exp_error is None:
        with mock.patch.multiple(steps, accumulate=product, activate=in_float32):
            yield
    else:
        with mock.patch.object(steps, "accumulate", product), mock.patch.object(formulas, "_exp", exp):
            yield


@given(
    product=st.sampled_from([term_by_term, fused_in_blocks]),
    mode_and_activation=st.sampled_from(
        [
            (mode, name)
            for mode in MODES
            for name in FORMULAS
            if name not in GLU or mode in ("float32", "fp16", "bf16")
        ]
    ),
    inner_precise=st.sampled_from([0, 1]),
    sizes=st.fixed_dictionaries(
        {"M": st.integers(1, 6), "K": st.integers(1, 12), "N": st.integers(1, 8).map(lambda half: 2 * half)}
    ),
    options=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**32),
            "E": st.integers(0, 3),
            "dyadic": st.booleans(),
            "magnitude": st.sampled_from([1.0, 2.0**12, 2.0**-14, 2.0**126]),
        }
    ),
    groups=st.booleans(),
    special=st.sampled_from([None, np.inf, -np.inf, np.nan]),
    exp_error=st.sampled_from([None, 0, EXP_ERROR, -EXP_ERROR]),
)
def test_any_float32_or_stepwise_kernel_keeps_the_bound(
    product: Any,
    mode_and_activation: tuple[str, str],
    inner_precise: int,
    sizes: Any,
    options: Any,
    groups: bool,
    special: Any,
    exp_error: float | None,
) -> None:
    mode, activation = mode_and_activation
    if groups:
        options["G"] = 2
        sizes["K"] *= 2
    if activation in GLU:
        sizes["N"] *= 2
    drawn = random_call(mode, activation, **sizes, **options) | {"inner_precise": inner_precise}
    if special is not None and drawn["x"].dtype != I8:
        drawn["x"][0, options["seed"] % sizes["K"]] = special
    stepwise = exp_error is not None
    with kernel(product, exp_error):
        y = reference.ffn(**drawn)
    assert_close(y, **drawn, kernel=Kernel(stepwise=stepwise))
    if drawn["x"].dtype == I8 and activation == "relu":
        assert not bound(**drawn, kernel=Kernel(stepwise=stepwise)).any()


@pytest.mark.parametrize("activation", list(SLOPE))
def test_constants_of_the_activations_hold(activation: str) -> None:
    x = np.linspace(-40, 40, 200_001).astype(F32)
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        value = activate(wide, activation)
        error = np.abs(activate(x, activation) - value)
    assert np.abs(np.diff(value) / np.diff(wide)).max() < SLOPE[activation]
    assert (error <= ACTIVATION_ERROR * (np.abs(value) + np.abs(wide) / 4)).all()


# Mutants: the reference with one mistake. assert_close must see each.


def changed(**arguments: Any) -> Callable[[dict[str, Any]], Array]:
    return lambda of: reference.ffn(**{**of, **arguments})


def patched(step: str, mutant: Callable[..., Array]) -> Callable[[dict[str, Any]], Array]:
    def mutate(of: dict[str, Any]) -> Array:
        with mock.patch.object(steps, step, mutant):
            return reference.ffn(**of)

    return mutate


def boundary_off_by_one(of: dict[str, Any]) -> Array:
    ends = np.cumsum(of["expert_tokens"])
    ends[0] += 1
    return reference.ffn(**{**of, "expert_tokens": ends, "tokens_index_flag": True})


def halves_swapped(of: dict[str, Any]) -> Array:
    swapped = {name: np.roll(of[name], of[name].shape[-1] // 2, axis=-1) for name in ("weight1", "bias1")}
    return reference.ffn(**{**of, **swapped})


def gelu_with_erf(x: Array, activation: str) -> Array:
    erf = np.vectorize(math.erf)
    return (x / 2 * (1 + erf(x.astype(np.float64) / math.sqrt(2)))).astype(x.dtype)


def quantize_with_one_rounding(value: Array, scale: Array, offset: Array) -> Array:
    wide, factor, shift = (v.astype(F16).astype(np.float64) for v in (value, scale, offset))
    return np.clip(np.rint(wide * factor + shift), -128, 127).astype(I8)


def scale_before_offset(product: Product, dtype: Any) -> Array:
    scale, offset = by_row(product, product.antiquant_scale), by_row(product, product.antiquant_offset)
    return (product.weight.astype(F32) * scale.astype(F32) + offset.astype(F32)).astype(dtype)


def interleaved_groups(product: Product, groups: Array) -> Array:
    return np.resize(np.atleast_2d(groups), product.weight.shape)


EVERY_BIT, NOT_ROUNDED = partial(multiplier, bits=ALL_32_BITS), lambda value, dtype: value.astype(F32)
MUTANTS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Array]]] = {
    "high precision as high performance": ({"mode": "fp16"}, changed(inner_precise=1)),
    "high performance as high precision": ({"mode": "fp16", "inner_precise": 1}, changed(inner_precise=0)),
    "GLU halves not rounded": ({"mode": "fp16", "activation": "swiglu"}, changed(inner_precise=0)),
    "GLU halves rounded": (
        {"mode": "fp16", "activation": "swiglu", "inner_precise": 0},
        changed(inner_precise=1),
    ),
    "GLU halves swapped": ({"mode": "bf16", "activation": "geglu"}, halves_swapped),
    "fp16 ties to even": ({"mode": "fp16"}, patched("half_away", nearest_even)),
    "bf16 ties to even": ({"mode": "bf16"}, patched("half_away", nearest_even)),
    "bf16 activation not rounded": ({"mode": "bf16"}, patched("half_away", NOT_ROUNDED)),
    "gelu with erf": ({"mode": "float32", "activation": "gelu"}, patched("activate", gelu_with_erf)),
    "deq_scale not cut": ({"mode": "w8a8"}, patched("multiplier", EVERY_BIT)),
    "Q rounds once": ({"mode": "w8a8", "M": 64}, patched("quantize", quantize_with_one_rounding)),
    "Q rounds once, gelu": (
        {"mode": "w8a8", "M": 64, "activation": "gelu"},
        patched("quantize", quantize_with_one_rounding),
    ),
    "scale before offset": ({"mode": "w8a16"}, patched("expand", scale_before_offset)),
    "groups interleaved": ({"mode": "w4a16_bf16", "G": 2}, patched("by_row", interleaved_groups)),
    "expert boundary": ({"mode": "w4a16", "E": 3, "dyadic": False}, boundary_off_by_one),
    **{f"{mode} without bias1": ({"mode": mode, "dyadic": False}, changed(bias1=None)) for mode in MODES},
    **{f"{mode} without bias2": ({"mode": mode, "dyadic": False}, changed(bias2=None)) for mode in MODES},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_breaks_the_bound(mutant: str) -> None:
    options, mutate = MUTANTS[mutant]
    arguments: dict[str, Any] = {"activation": "relu", "dyadic": True} | options
    flags = {name: arguments.pop(name) for name in ("inner_precise",) if name in arguments}
    drawn = random_call(**arguments) | flags
    for product in (term_by_term, fused_in_blocks):  # the mistake is what breaks it
        with kernel(product):
            assert_close(reference.ffn(**drawn), **drawn)
    for stepwise in (False, True):
        with pytest.raises(AssertionError, match="cells are beyond theirs"):
            assert_close(mutate(drawn), **drawn, kernel=Kernel(stepwise=stepwise))


def test_assert_close_names_the_worst_cell() -> None:
    args = np.ones((2, 1), F32), np.ones((1, 1), F32), np.ones((1, 1), F32), "relu"
    message = (
        r"y\[1, 0\] is 1.5, but the reference has 1.0 and the bound is 0 \(2 of 2 cells are beyond theirs\)"
    )
    with pytest.raises(AssertionError, match=message):
        assert_close(np.array([[1.25], [1.5]], F32), *args)
    with pytest.raises(AssertionError, match="float64"):
        assert_close(np.ones((2, 1)), *args)
    with pytest.raises(AssertionError, match=r"\(2,\)"):
        assert_close(np.ones(2, F32), *args)


def test_infinities_and_nans_are_compared_as_classes() -> None:
    one, big = np.ones((1, 1), F16), np.full((1, 1), 65504, F16)
    for wrong, args in (
        (np.nan, (big, one, 2 * one, "relu")),
        (-np.inf, (big, one, 2 * one, "relu")),
        (65504, (big, one, 2 * one, "relu")),
        (np.inf, (big, one, one, "relu")),
        (0, (one * np.nan, one, one, "relu")),
    ):
        assert_close(reference.ffn(*args), *args)
        with pytest.raises(AssertionError):
            assert_close(np.full((1, 1), wrong, F16), *args)
    # 65504 + 15.9921875 + 0.0077972 is within a float32 sum's error of 65520, where float16 becomes infinite.
    edge = one, np.ones((1, 3), F16), np.array([[65504], [15.9921875], [0.0078]], F16), "relu"
    for right in (65504, np.inf):
        assert_close(np.full((1, 1), right, F16), *edge)
    for wrong in (65472, -np.inf, np.nan):
        with pytest.raises(AssertionError):
            assert_close(np.full((1, 1), wrong, F16), *edge)
