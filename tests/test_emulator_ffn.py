# SPDX-License-Identifier: Apache-2.0
"""aclnnFFNV3 of the emulator over ctypes, without torch_npu: it accepts what the contract's
route "fused" accepts, and computes what the reference does. Calls come from strategies.py."""

import contextlib
import ctypes
from collections.abc import Iterator
from importlib.util import find_spec

import ml_dtypes
import numpy as np
import pytest
import tolerance
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import Call, any_calls, calls, numpy_dtype

import ffn_ops.emulator
from ffn_ops.contract import DTYPES, Spec

if find_spec("torch_npu"):
    pytest.skip("torch_npu brings the emulator up for itself (tests/npu)", allow_module_level=True)

ACL = dict(
    float32=0, float16=1, int8=2, int32=3, uint8=4, int16=6, uint16=7, uint32=8, int64=9, uint64=10,
    float64=11, bool=12, complex64=16, complex128=17, bfloat16=27, int4=29,
)  # fmt: skip
BEFORE = (
    "x", "weight1", "weight2", "expert_tokens", "bias1", "bias2", "scale", "offset", "deq_scale1",
    "deq_scale2", "antiquant_scale1", "antiquant_scale2", "antiquant_offset1", "antiquant_offset2",
)  # fmt: skip
SOC = {"ascend910b": b"Ascend910B1", "ascend310p": b"Ascend310P3"}
NULL, INVALID, TILING, INNER = 161001, 161002, 561103, 561000
ND = 2
TILING_RULES = {"inner_precise", "E-limit"}

ffn_ops.emulator.enable(operators=False)
RUNTIME, OBJECTS, OPERATORS = (
    ctypes.CDLL(str(ffn_ops.emulator.CANN / f"lib{name}.so")) for name in ("ascendcl", "nnopbase", "opapi")
)
OBJECTS.aclCreateTensor.restype = ctypes.c_void_p
I64, U64, POINTER = ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p


class Device:
    """One call's memory and tensors."""

    def __init__(self, stack: contextlib.ExitStack, target: str) -> None:
        self.stack = stack
        RUNTIME.emulator_configure(SOC[target], 2)
        stack.callback(RUNTIME.emulator_configure, SOC["ascend910b"], 2)
        assert RUNTIME.aclrtSetDevice(0) == 0
        self.stream = POINTER()
        assert RUNTIME.aclrtCreateStream(ctypes.byref(self.stream)) == 0
        stack.callback(RUNTIME.aclrtDestroyStream, self.stream)

    def memory(self, size: int) -> POINTER:
        found = POINTER()
        assert RUNTIME.aclrtMalloc(ctypes.byref(found), ctypes.c_size_t(max(size, 1)), 0) == 0
        self.stack.callback(RUNTIME.aclrtFree, found)
        return found

    def put(self, array: np.ndarray) -> POINTER:
        if array.dtype == ml_dtypes.int4:
            nibbles = array.astype(np.int8).view(np.uint8) & 15
            array = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
        data = np.ascontiguousarray(array).tobytes()
        memory = self.memory(len(data))
        if data:
            assert RUNTIME.aclrtMemcpy(memory, U64(len(data)), data, U64(len(data)), 1) == 0
        return memory

    def get(self, memory: POINTER, like: np.ndarray) -> np.ndarray:
        data = ctypes.create_string_buffer(max(like.nbytes, 1))
        if like.nbytes:
            assert RUNTIME.aclrtMemcpy(data, U64(like.nbytes), memory, U64(like.nbytes), 2) == 0
        return np.frombuffer(data.raw[: like.nbytes], like.dtype).reshape(like.shape)

    def tensor(self, spec: Spec, memory: POINTER, hollow: bool = False) -> POINTER:
        """hollow: every element is the same one, so that any size fits."""
        rank = len(spec.shape)
        dims = (I64 * rank)(*spec.shape)
        storage = (I64 * 1)(1) if hollow else dims
        made = OBJECTS.aclCreateTensor(
            dims, U64(rank), ACL[spec.dtype], (I64 * rank)() if hollow else None, I64(0), ND,
            storage, U64(len(storage)), memory,
        )  # fmt: skip
        assert made
        self.stack.callback(OBJECTS.aclDestroyTensor, POINTER(made))
        return POINTER(made)

    def phase1(self, call: Call, tensors: dict[str, POINTER], y: POINTER) -> tuple[int, U64, POINTER]:
        size, executor = U64(), POINTER()
        glu = call.activation.lower().endswith("glu")
        default = int(glu or call.target == "ascend310p")
        precise = default if call.inner_precise is None else call.inner_precise
        status = OPERATORS.aclnnFFNV3GetWorkspaceSize(
            *(tensors.get(name) for name in BEFORE), call.activation.encode(), I64(precise),
            ctypes.c_bool(call.tokens_index_flag), y, ctypes.byref(size), ctypes.byref(executor),
        )  # fmt: skip
        return status, size, executor

    def phase2(self, size: U64, executor: POINTER) -> int:
        workspace = self.memory(size.value) if size.value else None
        return OPERATORS.aclnnFFNV3(workspace, size, executor, self.stream) or RUNTIME.aclrtSynchronizeStream(
            self.stream
        )


@contextlib.contextmanager
def device(target: str = "ascend910b") -> Iterator[Device]:
    with contextlib.ExitStack() as stack:
        yield Device(stack, target)


def y_spec(call: Call) -> Spec:
    x = call.specs["x"]
    output = call.specs.get("output_dtype")
    return Spec(output.dtype if output else "float16" if x.dtype == "int8" else x.dtype, x.shape)


@given(call=any_calls())
@settings(max_examples=150)
def test_accepts_what_the_contract_accepts(call: Call) -> None:
    # Element counts stay within int64; absent required tensors have a code of their own (161001).
    assume(call.target in SOC and {"x", "weight1", "weight2"} <= call.specs.keys())
    assume(all(np.prod([float(n or 1) for n in spec.shape]) < 2.0**62 for spec in call.specs.values()))
    assume(all(spec.dtype in DTYPES and spec.dtype in ACL for spec in call.specs.values()))
    assume("out" not in call.specs)
    with device(call.target) as d:
        tensors = {
            name: d.tensor(spec, d.memory(16), hollow=True)
            for name, spec in call.specs.items()
            if name != "output_dtype"
        }
        status, _, executor = d.phase1(call, tensors, d.tensor(y_spec(call), d.memory(16), hollow=True))
        if status == 0:
            assert OBJECTS.aclDestroyAclOpExecutor(executor) == 0
        broken = call.violations()
        if 0 in call.specs["x"].shape and status == 0:
            # An empty x succeeds before the tiling layer looks at the call (c.1 step 18, c.3).
            assert {v.rule for v in broken} <= TILING_RULES, broken
        else:
            assert (status == 0) == (not broken), (status, broken)
        assert status in (0, INVALID, TILING)


@given(call=st.one_of(calls(target="ascend910b"), calls(target="ascend310p")), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_computes_what_the_reference_does(call: Call, seed: int) -> None:
    arrays = call.arrays(seed)
    options = call.reference_options()
    with device(call.target) as d:
        tensors = {name: d.tensor(call.specs[name], d.put(array)) for name, array in arrays.items()}
        like = np.zeros(y_spec(call).shape, numpy_dtype(y_spec(call).dtype))
        memory = d.put(like)
        status, size, executor = d.phase1(call, tensors, d.tensor(y_spec(call), memory))
        assert status == 0
        assert (size.value == 0) == (like.size == 0 or arrays["x"].size == 0)
        assert d.phase2(size, executor) == 0
        y = d.get(memory, like)
    # relu leaves only defined steps to int8: its bound is 0 there (contract e.7).
    options["inner_precise"] = call.plan().inner_precise
    tolerance.assert_close(y, **arrays, activation=call.activation, stepwise=True, **options)


SMALL = Call({name: Spec("float16", (2, 2)) for name in ("x", "weight1", "weight2")}, "relu", 1, "ascend910b")


def test_repeatable_executors_and_new_addresses() -> None:
    one, two = np.eye(2, dtype=np.float16), np.full((2, 2), 2, np.float16)
    with device() as d:
        tensors = {name: d.tensor(spec, d.put(one)) for name, spec in SMALL.specs.items()}
        memory, other = d.put(0 * one), d.put(0 * one)
        out = d.tensor(SMALL.specs["x"], memory)
        status, size, executor = d.phase1(SMALL, tensors, out)
        assert status == 0 and OBJECTS.aclSetAclOpExecutorRepeatable(executor) == 0
        assert d.phase2(size, executor) == 0 and d.phase2(size, executor) == 0
        assert OBJECTS.aclSetInputTensorAddr(executor, ctypes.c_size_t(0), tensors["x"], d.put(two)) == 0
        assert OBJECTS.aclSetOutputTensorAddr(executor, ctypes.c_size_t(0), out, other) == 0
        assert d.phase2(size, executor) == 0
        assert OBJECTS.aclDestroyAclOpExecutor(executor) == 0
        assert OBJECTS.aclDestroyAclOpExecutor(executor) == INVALID
        np.testing.assert_array_equal(d.get(memory, one), one)
        np.testing.assert_array_equal(d.get(other, one), two)


def test_misuse_is_refused() -> None:
    with device() as d:
        tensors = {
            name: d.tensor(spec, d.put(np.eye(2, dtype=np.float16))) for name, spec in SMALL.specs.items()
        }
        out = d.tensor(SMALL.specs["x"], d.memory(8))
        assert d.phase1(SMALL, {**tensors, "x": None}, out)[0] == NULL
        status, size, executor = d.phase1(SMALL, tensors, out)
        assert status == 0
        assert d.phase2(size, executor) == 0
        assert d.phase2(size, executor) == INNER  # a one-shot executor has ended
        status, size, executor = d.phase1(SMALL, tensors, out)
        assert OPERATORS.aclnnFFNV3(None, size, executor, d.stream) == INNER  # which ends it as well
        assert OBJECTS.aclDestroyAclOpExecutor(executor) == INVALID
