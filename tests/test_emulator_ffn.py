# SPDX-License-Identifier: Apache-2.0
"""aclnnFFN, V2 and V3 of the emulator: they accept what the contract's route "fused" accepts, and compute
what the reference does. Calls come from strategies.py. test_emulator_checks.py has the order of the checks,
test_emulator_executor.py the life of an executor."""

import re
from dataclasses import replace

import numpy as np
import pytest
import tolerance
from emulated import DTYPE, INNER, INVALID, OBJECTS, SOC, TILING, Device, device, message
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import Call, any_calls, calls, numpy_dtype

import reference
from ffn_ops.contract import DTYPES, Spec

TILING_RULES = {"inner_precise", "E-limit", "expert_tokens-dtype", "output_dtype-dtype"}
SEEDS = st.integers(0, 2**32 - 1)


def y_spec(call: Call) -> Spec:
    x = call.specs["x"]
    output = call.specs.get("output_dtype")
    return Spec(output.dtype if output else "float16" if x.dtype == "int8" else x.dtype, x.shape)


def inner_precise(call: Call) -> int:
    default = int(call.activation.lower().endswith("glu") or call.target == "ascend310p")
    return default if call.inner_precise is None else call.inner_precise


@given(call=any_calls())
@settings(max_examples=150)
def test_accepts_what_the_contract_accepts(call: Call) -> None:
    # Absent required tensors have a code of their own (161001).
    assume(call.target in SOC and {"x", "weight1", "weight2"} <= call.specs.keys())
    assume(all(spec.dtype in DTYPES and spec.dtype in DTYPE for spec in call.specs.values()))
    assume(not {"out", "topk_ids", "topk_weights"} & call.specs.keys())
    with device(call.target) as d:
        specs = {name: spec for name, spec in call.specs.items() if name != "output_dtype"}
        tensors = {name: d.hollow(*spec) for name, spec in (specs | {"y": y_spec(call)}).items()}
        status, _, executor = d.phase1(tensors, call.activation, inner_precise(call), call.tokens_index_flag)
        if status == 0:
            assert OBJECTS.aclDestroyAclOpExecutor(executor) == 0
        broken = call.violations()
        if 0 in call.specs["x"].shape and status == 0:
            # An empty x succeeds before the tiling layer looks at the call (c.1 step 18, c.3).
            assert {v.rule for v in broken} <= TILING_RULES, broken
        else:
            assert (status == 0) == (not broken), (status, broken)
        assert status in (0, INVALID, TILING)


def compute(d: Device, call: Call, arrays: dict[str, np.ndarray], version: str = "V3") -> np.ndarray:
    tensors = {
        name: d.int_array(array.tolist())
        if name == "expert_tokens" and version != "V3"
        else d.tensor(d.put(array), *call.specs[name])
        for name, array in arrays.items()
    }
    spec = y_spec(call)
    like = np.zeros(spec.shape, numpy_dtype(spec.dtype))
    memory = d.put(like)
    tensors["y"] = d.tensor(memory, *spec)
    status, size, executor = d.phase1(
        tensors, call.activation, inner_precise(call), call.tokens_index_flag, version=version
    )
    assert status == 0, message()
    assert (size.value == 0) == (arrays["x"].size == 0)
    assert d.phase2(size, executor, version) == 0, message()
    return d.get(memory, like)


def bits(array: np.ndarray) -> np.ndarray:
    """Of 16-bit floats, with one NaN."""
    return np.where(np.isnan(array.astype(np.float32)), np.uint16(0x7FFF), array.view(np.uint16))


@given(call=st.one_of(calls(target="ascend910b"), calls(target="ascend310p")), seed=SEEDS)
@settings(max_examples=100)
def test_computes_what_the_reference_does(call: Call, seed: int) -> None:
    arrays = call.arrays(seed)
    with device(call.target) as d:
        y = compute(d, call, arrays)
    options = call.reference_options() | {"inner_precise": call.plan().inner_precise}
    tolerance.assert_close(
        y, **arrays, activation=call.activation, kernel=tolerance.Kernel(stepwise=True), **options
    )


@given(call=calls("ascend910b", modes=("w8a8", "w8a8_bf16"), glu=False), seed=SEEDS, wild=st.booleans())
@settings(max_examples=100)
def test_relu_and_int8_agree_to_the_bit(call: Call, seed: int, wild: bool) -> None:
    """Contract e.7. Wild: scales and offsets beyond float16's range at both ends, sums that wrap, NaN."""
    arrays = call.arrays(seed)
    if wild:
        rng = np.random.default_rng(seed)
        for name, array in arrays.items():
            if name in ("scale", "offset"):
                arrays[name] = (array * 10.0 ** rng.integers(-9, 9, array.shape)).astype(np.float32)
            elif name.startswith("bias"):
                arrays[name] = rng.integers(-(2**31), 2**31, array.shape).astype(np.int32)
            elif name.startswith("deq_scale") and array.dtype.kind in "ui":
                arrays[name] = rng.integers(-(2**63), 2**63, array.shape).astype(array.dtype)
            elif name.startswith("deq_scale"):
                arrays[name] = (array * 10.0 ** rng.integers(-9, 9, array.shape)).astype(array.dtype)
    with device() as d:
        y = compute(d, replace(call, activation="ReLU"), arrays)
    expected = reference.ffn(**arrays, activation="relu", **call.reference_options())
    np.testing.assert_array_equal(bits(y), bits(expected))


@given(call=calls(target="ascend910b"), seed=SEEDS)
@settings(max_examples=30)
def test_versions_1_and_2_compute_what_3_does(call: Call, seed: int) -> None:
    arrays = call.arrays(seed)
    with device() as d:
        y = bits(compute(d, call, arrays))
        np.testing.assert_array_equal(bits(compute(d, call, arrays, "V2")), y)
        if "expert_tokens" in arrays and call.tokens_index_flag:  # which V1 has not
            arrays["expert_tokens"] = np.array(call.tokens)
        np.testing.assert_array_equal(bits(compute(d, call, arrays, "")), y)


def scattered(array: np.ndarray) -> tuple[np.ndarray, list[int], int]:
    """Memory of four or more times the size that holds the array with its axes reversed, at every second
    index from 1 on; its strides and offset in elements."""
    wide = np.zeros([2 * size for size in reversed(array.shape)], array.dtype)
    view = view_of(wide)
    view[...] = array
    strides = [stride // wide.itemsize for stride in view.strides]
    return wide, strides, sum(strides) // 2


def view_of(wide: np.ndarray) -> np.ndarray:
    return wide[(slice(1, None, 2),) * wide.ndim].T


@given(call=calls(target="ascend910b"), seed=SEEDS)
@settings(max_examples=30)
def test_any_strides_of_inputs_and_y(call: Call, seed: int) -> None:
    arrays = call.arrays(seed)
    spec = y_spec(call)
    with device() as d:
        dense = compute(d, call, arrays)
        tensors = {}
        for name, array in (arrays | {"y": np.full(spec.shape, 7, dense.dtype)}).items():
            dtype = spec.dtype if name == "y" else call.specs[name].dtype
            wide, strides, offset = scattered(array)
            memory = d.put(wide)
            tensors[name] = d.tensor(memory, dtype, array.shape, strides, offset, [wide.size])
        status, size, executor = d.phase1(
            tensors, call.activation, inner_precise(call), call.tokens_index_flag
        )
        assert status == 0, message()
        assert d.phase2(size, executor) == 0, message()
        y = d.get(memory, wide)
    np.testing.assert_array_equal(bits(y), bits(scattered(dense)[0]))  # nothing else was written


ROWS = 6
MOE = {"x": (ROWS, 4), "weight1": (3, 4, 8), "weight2": (3, 8, 4)}


@pytest.mark.parametrize(
    ("tokens", "index", "written"),
    [
        ((1, 0, 3), False, 4),  # fewer than there are rows: the rest is untouched (contract d)
        ((1, 1, 4), True, 4),
        ((0, 0, 0), False, 0),
        ((0, 0, 0), True, 0),
        ((1, 2, 3), False, ROWS),
        # Undefined on a device, refused here:
        ((3, 2, 2), False, None),
        ((1, 2, ROWS + 1), True, None),
        ((ROWS + 1, 1, 1), True, None),
        ((4, 3, 6), True, None),
        ((3, -1, 4), False, None),
        ((-1, 3, 6), True, None),
        ((2**62, 2**62, 2**62), False, None),
        ((2**63 - 1, 2**63 - 1, 8), False, None),  # 6 in 64 bits
        ((-(2**63), 0, 0), False, None),
    ],
)
def test_expert_tokens_in_phase_2(tokens: tuple[int, ...], index: bool, written: int | None) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in MOE.items()}
    before = np.full((ROWS, 4), 7, np.float16)
    with device() as d:
        tensors = {name: d.tensor(d.put(array), "float16", array.shape) for name, array in arrays.items()}
        tensors["expert_tokens"] = d.tensor(d.put(np.array(tokens)), "int64", [3])
        memory = d.put(before)
        tensors["y"] = d.tensor(memory, "float16", before.shape)
        status, size, executor = d.phase1(tensors, "relu", 0, index)
        assert status == 0
        assert d.phase2(size, executor) == (INNER if written is None else 0)
        if written is None:
            said = re.match(r"FFN: expertTokens\[(\d)\] is (-?\d+), after \d+ of the 6 rows of x,", message())
            assert said and int(said[2]) == tokens[int(said[1])]
        y = d.get(memory, before)
    np.testing.assert_array_equal(y[written or 0 :], before[written or 0 :])
    if written:
        expected = reference.ffn(
            **arrays, activation="relu", expert_tokens=np.array(tokens), tokens_index_flag=index
        )
        np.testing.assert_allclose(y[:written], expected[:written], rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("tokens", "index", "text"),
    [
        ((3, -1, 4), False, "expertTokens has a negative value"),
        ((3, -1, 4), True, "expertTokens has a negative value"),
        ((4, 3, 6), True, "expertTokens decreases"),
        ((1, 0, 3), False, "expertTokens adds up to 4, but x has 6 rows (they must be equal)"),
        ((1, 2, 5), True, "expertTokens ends at 5, but x has 6 rows (they must be equal)"),
        (
            (2**63 - 1, 2**63 - 1, 8),  # 6 in 64 bits
            False,
            f"expertTokens adds up to {2**63 - 1}, but x has 6 rows (they must be equal)",
        ),
        ((1, 5), False, "weight1 must have E experts"),
        ((), False, "weight1 must have 2 dimensions"),  # no experts
    ],
)
def test_token_lists_of_versions_1_and_2(tokens: tuple[int, ...], index: bool, text: str) -> None:
    for version in ["V2"] if index else ["", "V2"]:  # V1 takes counts only
        with device() as d:
            tensors = {name: d.hollow("float16", shape) for name, shape in (MOE | {"y": MOE["x"]}).items()}
            tensors["expert_tokens"] = d.int_array(tokens)
            assert d.phase1(tensors, "relu", 0, index, version=version)[0] == INVALID
            assert message() == f"aclnnFFN{version}: {text}"


def test_a_row_of_bias2_uses_all_bits_of_deq_scale2() -> None:
    """N1 == 0, contract d: here the multiplier is not cut to 19 bits, which would leave 1."""
    pattern = np.array([0x3F801FFF], np.uint32)
    for deq in (pattern.view(np.float32), pattern.astype(np.uint64)):
        dtype = deq.dtype.name
        specs = {
            "x": Spec("int8", (2, 1)), "weight1": Spec("int8", (1, 0)), "weight2": Spec("int8", (0, 1)),
            "bias2": Spec("int32", (1,)), "scale": Spec("float32", (1,)), "offset": Spec("float32", (1,)),
            "deq_scale1": Spec(dtype, (0,)), "deq_scale2": Spec(dtype, (1,)),
        }  # fmt: skip
        arrays = {name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items()}
        arrays |= {"bias2": np.array([1024], np.int32), "deq_scale2": deq}
        with device() as d:
            y = compute(d, Call(specs, "relu", 0, "ascend910b"), arrays)
        np.testing.assert_array_equal(y, [[1025], [1025]])


def test_a_row_of_bias2_stays_nan_in_bfloat16() -> None:
    """N1 == 0: the upper half of this NaN's bits is infinity."""
    shapes = {"x": (2, 1), "weight1": (1, 0), "weight2": (0, 1)}
    specs = {name: Spec("bfloat16", shape) for name, shape in shapes.items()} | {
        "bias2": Spec("float32", (1,))
    }
    arrays = {name: np.zeros(spec.shape, numpy_dtype(spec.dtype)) for name, spec in specs.items()}
    arrays["bias2"] = np.array([0x7F800001], np.uint32).view(np.float32)
    with device() as d:
        y = compute(d, Call(specs, "relu", 0, "ascend910b"), arrays)
    assert np.isnan(y.astype(np.float32)).all()
