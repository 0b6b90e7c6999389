# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels of every instruction set against the reference, and a row's bits against everything else.

tests/native.py calls them, tests/tolerance.py holds the bound. What the operator adds is in test_op.py.
"""

import os
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native import (
    BOUNDARY,
    EMULATED,
    HARDWARE_ISAS,
    KERNELS,
    SLOW_ISAS,
    SUPPORTED_ISAS,
    each_isa,
    native_ffn,
)
from tolerance import FLUSHED, assert_close

import reference
from ffn_ops import _native

BF16, INT4 = ml_dtypes.bfloat16, ml_dtypes.int4
# mode: dtype of x, of the weights, of y
MODES = {
    "float32": (np.float32, np.float32, np.float32),
    "fp16": (np.float16, np.float16, np.float16),
    "bf16": (BF16, BF16, BF16),
    "w8a8": (np.int8, np.int8, np.float16),
    "w8a8_bf16": (np.int8, np.int8, BF16),
    "w8a16": (np.float16, np.int8, np.float16),
    "w8a16_bf16": (BF16, np.int8, BF16),
    "w4a16": (np.float16, INT4, np.float16),
    "w4a16_bf16": (BF16, INT4, BF16),
}
FLOAT_MODES = ("float32", "fp16", "bf16")
GLU = ("geglu", "swiglu", "reglu")
PLAIN = ("fastgelu", "gelu", "relu", "silu", "gelu_erf", "relu2")
# Around the panels' widths (8, 16, 64), the rows of a tile (6) and the blocks of K (32 to 256).
EDGES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129, 255, 256, 257)
SEED = 20240607
BIT_46 = np.uint64(1 << 46)  # of a 64-bit deq_scale; no effect


def make_call(
    mode: str,
    activation: str,
    M: int,
    K1: int,
    K2: int,
    *,
    seed: int = SEED,
    counts: tuple[int, ...] = (),
    groups: tuple[int, int] | None = None,
    biases: tuple[bool, bool] = (True, True),
    per_channel_scale: bool = False,
    deq_dtype: Any = np.uint64,
    inner_precise: int | None = None,
    transposed: bool = False,
) -> dict[str, Any]:
    """Arguments of reference.ffn with N2 == K1, scaled so that every stage stays in range."""
    rng = np.random.default_rng(seed)
    x_dtype, w_dtype, y_dtype = MODES[mode]
    if w_dtype == INT4:
        K1, K2 = K1 + K1 % 2, K2 + K2 % 2
    N1 = 2 * K2 if activation in GLU else K2
    E = (len(counts),) if counts else ()
    quant = x_dtype == np.int8
    bias_dtype = np.int32 if quant else np.float16 if x_dtype == np.float16 else np.float32

    def normal(shape: tuple[int, ...], scale: float, dtype: Any) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(dtype)

    def integers(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        low, high = (-8, 8) if dtype == INT4 else (-128, 128)
        return rng.integers(low, high, shape).astype(np.int8).astype(dtype)

    call: dict[str, Any] = {
        "activation": activation,
        "inner_precise": _legal(inner_precise, x_dtype, activation),
    }
    call["x"] = integers((M, K1), np.int8) if quant else normal((M, K1), 1, x_dtype)
    for i, K, N in ((1, K1, N1), (2, K2, K1)):
        shape = (*E, N, K) if transposed else (*E, K, N)
        unit = 1 / np.sqrt(max(K, 1))
        integer = w_dtype in (np.int8, INT4)
        weight = integers(shape, w_dtype) if integer else normal(shape, unit, w_dtype)
        call[f"weight{i}"] = weight.swapaxes(-1, -2) if transposed else weight
        if biases[i - 1]:
            call[f"bias{i}"] = normal((*E, N), 2000 if quant else 0.5, bias_dtype)
        if quant:
            # Sums of K products of int8 are about 5000 sqrt(K); dequantised they are about 1.
            deq_scale = (rng.uniform(0.5, 2, (*E, N)) * 2e-4 * unit).astype(np.float32)
            if y_dtype == BF16:
                deq_scale = deq_scale.astype(BF16)
            elif deq_dtype != np.float32:
                deq_scale = (deq_scale.view(np.uint32).astype(np.uint64) | BIT_46).view(deq_dtype)
            call[f"deq_scale{i}"] = deq_scale
        elif integer:
            shape = (*E, N) if groups is None else (*E, groups[i - 1], N)
            step = unit / (4 if w_dtype == INT4 else 64)
            call[f"antiquant_scale{i}"] = (rng.uniform(0.5, 2, shape) * step).astype(x_dtype)
            call[f"antiquant_offset{i}"] = normal(shape, 2, x_dtype)
    if quant:
        call["scale"] = rng.uniform(20, 80, (*E, K2) if per_channel_scale else E or (1,)).astype(np.float32)
        call["offset"] = rng.uniform(-20, 20, E or (1,)).astype(np.float32)
        call["output_dtype"] = y_dtype
    if counts:
        call["expert_tokens"] = np.array(counts, np.int64)
    return call


def _legal(inner_precise: int | None, x_dtype: Any, activation: str) -> int | None:
    """bf16 has high precision only."""
    return None if x_dtype == BF16 and activation not in GLU else inner_precise


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


def check(call: dict[str, Any], isa: str) -> None:
    y = native_ffn(**call, isa=isa)
    assert same_bits(native_ffn(**call, isa=isa, packed=True), y)
    assert_close(y, **call, kernel=KERNELS[isa])
    if call["x"].dtype == np.int8 and call["activation"] in ("relu", "reglu"):
        assert np.array_equal(y, reference.ffn(**call))


@each_isa
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("counts", [(), (3, 0, 7, 1)], ids=["dense", "experts"])
def test_every_mode_and_activation_agrees_with_the_reference(isa, mode, activation, counts):
    for inner_precise in (0, 1) if MODES[mode][0] == np.float16 else (0,):
        check(make_call(mode, activation, 11, 80, 144, counts=counts, inner_precise=inner_precise), isa)


@each_isa
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("counts", [(), (1, 0, 1)], ids=["dense", "experts"])
@pytest.mark.parametrize("K2", [352, 336])  # whole panels, and not
def test_a_single_row_reads_plain_weights_as_packed_ones(isa, mode, counts, K2):
    for activation in ("relu", "swiglu"):
        check(make_call(mode, activation, max(sum(counts), 1), 288, K2, counts=counts), isa)


@each_isa
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", GLU)
@pytest.mark.parametrize("counts", [(), (3, 0, 7, 1)], ids=["dense", "experts"])
@pytest.mark.parametrize("K2", [144, 33])  # of 33, the right half begins inside a panel
def test_glu_agrees_with_the_reference(isa, mode, activation, counts, K2):
    for inner_precise in (0, 1) if MODES[mode][0] == np.float16 else (0,):
        for per_channel_scale in (False, True):
            check(
                make_call(
                    mode, activation, 11, 80, K2, counts=counts, inner_precise=inner_precise,
                    per_channel_scale=per_channel_scale,
                ), isa
            )  # fmt: skip


@each_isa
@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("mode", MODES)
def test_every_size_of_tail_agrees_with_the_reference(isa, mode, size):
    for M, K1, K2 in ((size, 3, 5), (2, size, 5), (2, 3, size), (7, size, size)):
        check(make_call(mode, "relu", M, K1, K2), isa)


@each_isa
@pytest.mark.parametrize("mode", [m for m in MODES if not m.startswith("w4")])
@pytest.mark.parametrize(
    "sizes", [(1, 257, 130), (9, 70, 33), (2, 1, 1), (40, 16, 300), (3, 600, 90), (4, 33, 288)]
)
def test_transposed_weights_are_the_same_weights(isa, mode, sizes):
    for counts in ((), (0, sizes[0] - 1, 1)):
        call = make_call(mode, "silu", *sizes, counts=counts, transposed=True)
        dense = {**call, "weight1": call["weight1"].copy("C"), "weight2": call["weight2"].copy("C")}
        assert same_bits(native_ffn(**call, isa=isa), native_ffn(**dense, isa=isa))
        check(call, isa)


@each_isa
@pytest.mark.parametrize("mode", ["w8a16", "w8a16_bf16", "w4a16", "w4a16_bf16"])
@pytest.mark.parametrize("groups", [(1, 1), (3, 8), (96, 2), (2, 64)])
def test_groups_agree_with_the_reference(isa, mode, groups):
    for counts in ((), (2, 3), (17, 0, 33)):
        M = sum(counts) or 5
        check(make_call(mode, "gelu", M, 96, 128, counts=counts, groups=groups), isa)
        if mode.startswith("w8"):
            check(make_call(mode, "gelu", M, 96, 128, counts=counts, groups=groups, transposed=True), isa)


@each_isa
@pytest.mark.parametrize("rows", [3, 9, 17])  # few, more, and what products of bf16 take
@pytest.mark.parametrize("mode", ["w8a16_bf16", "w4a16_bf16"])
def test_scaling_after_the_sum_loses_no_infinity_and_makes_none(isa, mode, rows):
    call = make_call(mode, "relu", rows, 64, 32, groups=(2, 1))
    call["x"][0, 0] = np.inf  # infinity times (w + offset), not infinity times w plus infinity times offset
    call["x"][1] = 1e37  # whose sums exceed float32 before they are scaled
    call["antiquant_scale1"][:] = call["antiquant_scale2"][:] = 1e-37
    call["x"][2, 5] = np.nan
    y = native_ffn(**call, isa=isa)
    assert np.isfinite(y[1]).all() and y[1].any()
    assert np.isnan(y[2]).all()
    check(call, isa)


@each_isa
@pytest.mark.parametrize("mode", ["w8a8", "w8a8_bf16"])
@pytest.mark.parametrize("per_channel_scale", [False, True])
@pytest.mark.parametrize("deq_dtype", [np.uint64, np.int64, np.float32])
def test_w8a8_with_relu_is_the_reference_bit_for_bit(isa, mode, per_channel_scale, deq_dtype):
    options: Any = {"per_channel_scale": per_channel_scale, "deq_dtype": deq_dtype}
    for counts in ((), (9, 0, 4)):
        call = make_call(mode, "relu", 13, 300, 520, counts=counts, **options)
        assert same_bits(native_ffn(**call, isa=isa), reference.ffn(**call))


@each_isa
def test_w8a8_sums_are_exact_and_wrap_around(isa):
    call = make_call("w8a8", "relu", 3, 2050, 3000)
    call["x"][:] = -128
    call["weight1"][:] = -128
    call["weight2"][:] = 127
    call["bias2"][:] = 2**31 - 1
    assert same_bits(native_ffn(**call, isa=isa), reference.ffn(**call))


@each_isa
@pytest.mark.parametrize("name", ["scale", "offset"])
@pytest.mark.parametrize("value", [0.0, 1e-9, 3e-6, 65504.0, 70000.0, -np.inf, np.nan])
def test_w8a8_quantizes_extreme_scales_as_the_reference(isa, name, value):
    call = make_call("w8a8", "relu", 4, 64, 64)
    call[name][:] = value
    assert np.array_equal(native_ffn(**call, isa=isa), reference.ffn(**call), equal_nan=True)


@each_isa
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_without_hidden_channels_y_is_bias2(isa, mode, with_bias):
    for counts in ((), (2, 0, 4)):
        call = make_call(mode, "relu", 6, 130, 0, counts=counts, biases=(False, with_bias))
        if with_bias:
            call["bias2"][..., 0] = -0.0
        assert same_bits(native_ffn(**call, isa=isa), reference.ffn(**call))


@each_isa
@pytest.mark.parametrize("mode", MODES)
def test_empty_x_gives_empty_y(isa, mode):
    assert native_ffn(**make_call(mode, "relu", 0, 8, 16), isa=isa).shape == (0, 8)
    assert native_ffn(**make_call(mode, "relu", 3, 0, 16), isa=isa).shape == (3, 0)


def one_by_one(
    x: np.ndarray, activation: str, factor: float = 1, inner_precise: int | None = None
) -> dict[str, Any]:
    """y = act(factor x), element by element: both products have K == 1."""
    weight1 = np.full((1, 2 if activation in GLU else 1), factor, x.dtype)
    weight2 = np.ones((1, 1), x.dtype)
    inner_precise = _legal(inner_precise, x.dtype, activation)
    return {"x": x[:, None], "weight1": weight1, "weight2": weight2, "activation": activation,
            "inner_precise": inner_precise}  # fmt: skip


@each_isa
@pytest.mark.parametrize("mode", FLOAT_MODES)
@pytest.mark.parametrize("activation", PLAIN + GLU)
@pytest.mark.parametrize("inner_precise", [0, 1])
def test_infinities_nans_and_subnormals_propagate_as_the_formula_says(isa, mode, activation, inner_precise):
    values = [np.nan, np.inf, -np.inf, 0.0, -0.0, 6e4, -6e4, 1e-7, -1e-7, 3e38, -3e38, 1e-40, 1.0]
    with np.errstate(over="ignore"):
        x = np.array(values, np.float32).astype(MODES[mode][0])
    check(one_by_one(x, activation, inner_precise=inner_precise), isa)


@each_isa
@pytest.mark.parametrize("dtype", [np.float16, BF16])
@pytest.mark.parametrize("inner_precise", [0, 1])
@pytest.mark.parametrize("factor", [1.0, 1.5, -1.25, 1.5 * 2**-10, 1.5 * 2**10])
def test_every_16_bit_number_is_read_and_rounded_as_the_reference_does(isa, dtype, inner_precise, factor):
    """A short factor makes ties: to even in fp16 high performance, else away from zero."""
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    call = one_by_one(every, "relu", factor, inner_precise=inner_precise)
    expected = reference.ffn(**call)
    if KERNELS[isa].flushes and dtype == BF16:  # they take for zero what is subnormal, before and after
        with np.errstate(invalid="ignore"):
            x = every.astype(np.float64)
            expected[np.fmin(abs(x), abs(x * factor)) < FLUSHED] = 0
    assert np.array_equal(native_ffn(**call, isa=isa), expected, equal_nan=True)


@each_isa
@pytest.mark.parametrize("activation", ["fastgelu", "gelu", "silu", "gelu_erf", "relu2"])
def test_activations_keep_a_few_ulp_over_their_whole_range(isa, activation):
    wide = np.geomspace(1e-30, 1e30, 5000)
    x = np.concatenate([np.linspace(-120, 120, 20001), wide, -wide]).astype(np.float32)
    check(one_by_one(x, activation), isa)


@each_isa
@pytest.mark.parametrize("mode", MODES)
def test_a_rows_bits_depend_on_nothing_but_the_row(isa, mode):
    """Not on how many rows there are, the row's place, or the other rows."""
    M, K1, K2 = 300, 272, 320  # more than one wave of rows, blocks of K and blocks of columns
    call = make_call(mode, "gelu", M, K1, K2)
    whole = native_ffn(**call, isa=isa)
    parts = ((0, 1), (1, 8), (8, 41), (41, 300), (299, 300))
    if boundary := BOUNDARY[isa].get(mode):
        parts = ((0, boundary), (boundary, 2 * boundary + 1), (2 * boundary + 1, 300))
        few = native_ffn(**{**call, "x": call["x"][: boundary - 1]}, isa=isa)
        for begin, end in ((0, 1), (1, 4), (4, boundary // 2), (4, boundary - 1)):
            assert same_bits(native_ffn(**{**call, "x": call["x"][begin:end]}, isa=isa), few[begin:end])
    for begin, end in parts:
        assert same_bits(native_ffn(**{**call, "x": call["x"][begin:end]}, isa=isa), whole[begin:end])
    order = np.random.default_rng(SEED).permutation(M)
    assert same_bits(native_ffn(**{**call, "x": call["x"][order]}, isa=isa), whole[order])
    if call["x"].dtype != np.int8:
        poisoned = call["x"].copy()
        poisoned[::2] = np.nan
        assert same_bits(native_ffn(**{**call, "x": poisoned}, isa=isa)[1::2], whole[1::2])


@each_isa
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_neither_caches_nor_workers_change_a_bit(isa, mode, activation):
    """By them a call is cut into waves of rows, blocks of columns and tasks."""
    counts = (70, 3, 0, 150)
    call = make_call(mode, activation, sum(counts), 272, 320, counts=counts)
    whole = native_ffn(**call, isa=isa)
    for cache_bytes in (1, 1 << 18, 1 << 26):
        for packed in (False, True):
            y = native_ffn(**call, isa=isa, threads=8, cache_bytes=cache_bytes, packed=packed)
            assert same_bits(y, whole)


@each_isa
@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("mode", ["fp16", "w8a16", "w8a16_bf16", "w4a16", "w4a16_bf16"])
def test_an_infinite_column_changes_no_bit_of_its_neighbours(isa, mode, rows):
    """Its sum is computed again, in another way; which columns share its task is chance."""
    call = make_call(mode, "relu", rows, 272, 640)
    call["x"] = abs(call["x"])
    call["weight1" if mode == "fp16" else "antiquant_offset1"][..., 70] = -np.inf  # which relu makes 0
    whole = native_ffn(**call, isa=isa)
    assert np.isfinite(whole.astype(np.float32)).all()
    check(call, isa)
    for cache_bytes in (1, 1 << 18):
        for packed in (False, True):
            y = native_ffn(**call, isa=isa, threads=8, cache_bytes=cache_bytes, packed=packed)
            assert same_bits(y, whole)


@each_isa
@pytest.mark.parametrize("mode", ["w8a16_bf16", "w4a16_bf16"])
def test_rows_that_fill_a_group_up_are_no_rows(isa, mode):
    call = make_call(mode, "relu", 40, 302, 64)
    call["x"] = abs(call["x"])
    call["antiquant_offset1"][..., 3] = np.inf  # of the rows beyond K, zeros, it would make NaN
    check(call, isa)


@each_isa
@pytest.mark.parametrize("mode", MODES)
def test_experts_are_so_many_dense_calls(isa, mode):
    counts = (0, 1, 0, 270, 5, 17, 0)
    call = make_call(mode, "silu", sum(counts), 48, 96, counts=counts)
    tokens = call.pop("expert_tokens")
    for threads in (1, 3):
        y = native_ffn(**call, expert_tokens=tokens, isa=isa, threads=threads)
        ends = np.cumsum(tokens)
        assert same_bits(native_ffn(**call, expert_tokens=ends, tokens_index_flag=True, isa=isa), y)
        for e, (begin, end) in enumerate(zip(ends - tokens, ends, strict=True)):
            of_expert = {n: np.atleast_1d(v[e]) for n, v in call.items() if isinstance(v, np.ndarray)}
            dense = {**call, **of_expert, "x": call["x"][begin:end]}
            assert same_bits(native_ffn(**dense, isa=isa), y[begin:end])


@each_isa
def test_empty_experts_weights_are_never_read(isa):
    call = make_call("float32", "relu", 4, 8, 16, counts=(0, 4, 0))
    expected = native_ffn(**call, isa=isa)
    for name in ("weight1", "weight2", "bias1", "bias2"):
        call[name][[0, 2]] = np.nan
    assert same_bits(native_ffn(**call, isa=isa), expected)


@each_isa
@given(data=st.data())
def test_random_calls_agree_with_the_reference(isa, data):
    mode = data.draw(st.sampled_from(list(MODES)))
    size = st.integers(1, 40)
    counts = data.draw(st.just(()) | st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple))
    activation = data.draw(st.sampled_from(PLAIN + GLU))
    call = make_call(
        mode, activation, sum(counts) if counts else data.draw(size), data.draw(size), data.draw(size),
        counts=counts, seed=data.draw(st.integers(0, 2**32)),
        biases=(data.draw(st.booleans()), data.draw(st.booleans())),
        per_channel_scale=data.draw(st.booleans()),
        inner_precise=data.draw(st.sampled_from([None, 0, 1])),
        transposed=data.draw(st.booleans()) and not mode.startswith("w4"),
    )  # fmt: skip
    check(call, isa)


def test_the_environment_forces_an_instruction_set_or_is_refused():
    def selected(isa: str) -> subprocess.CompletedProcess[str]:
        program = "from ffn_ops import _native; print(_native.selected_isa())"
        environment = {**os.environ, "FFN_OPS_ISA": isa}
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )

    names = ", ".join(name for name, _ in _native.isas())
    sentence = f"FFN_OPS_ISA is avx1024, but this build has {names} (unset it, or name one of these)"
    assert selected("generic").stdout == "generic\n"
    assert sentence in selected("avx1024").stderr
    assert _native.selected_isa() in HARDWARE_ISAS


def test_arrays_that_do_not_fit_together_are_refused_in_the_contracts_words():
    call = make_call("float32", "relu", 4, 8, 16)
    with pytest.raises(ValueError, match=r"bias1 has shape \[15\], but it must be \[N1\] = \[16\]"):
        native_ffn(**{**call, "bias1": call["bias1"][:-1]})
    with pytest.raises(ValueError, match="bias2 is not C-contiguous and aligned"):
        native_ffn(**{**call, "bias2": np.zeros(16, np.float32)[::2]})
    with pytest.raises(ValueError, match="scale3 is not in the contract's tables"):
        native_ffn(**call, scale3=call["bias1"])
    call = make_call("float32", "relu", 4, 8, 16, counts=(3,))
    with pytest.raises(ValueError, match="expert_tokens covers 3 rows, but x has M = 4"):
        native_ffn(**call)


@pytest.mark.parametrize("isa", SLOW_ISAS)
@pytest.mark.parametrize("mode", ["w8a8", "w8a8_bf16"])
@pytest.mark.parametrize("counts", [(), (1, 0, 13, 4)], ids=["dense", "experts"])
def test_emulated_dot_products_of_int8_agree_with_the_reference(isa, mode, counts):
    """What the slow tests do at length."""
    M = sum(counts) or 5
    for activation in ("relu", "swiglu"):
        for transposed in (False, True):
            check(make_call(mode, activation, M, 70, 36, counts=counts, transposed=transposed), isa)


@pytest.mark.skipif(
    "amx" in HARDWARE_ISAS or "amx" not in SUPPORTED_ISAS,
    reason="asks the emulated tiles, and this machine has real ones, or not what emulating them takes",
)
def test_tiles_are_released():
    """A thread that keeps them is slow to switch, for the rest of its life."""
    native_ffn(**make_call("bf16", "gelu", 40, 64, 300), isa="amx", threads=3)
    assert EMULATED is not None and EMULATED.ThreadsWithTiles() == 0
