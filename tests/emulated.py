# SPDX-License-Identifier: Apache-2.0
"""The emulator's aclnnFFN over ctypes, without torch_npu: what the test_emulator_*.py share."""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import ml_dtypes
import numpy as np
import pytest

import ffn_ops.emulator

if find_spec("torch_npu"):
    pytest.skip("torch_npu brings the emulator up for itself (tests/npu)", allow_module_level=True)

DTYPE = dict(
    float32=0, float16=1, int8=2, int32=3, uint8=4, int16=6, uint16=7, uint32=8, int64=9, uint64=10,
    float64=11, bool=12, complex64=16, complex128=17, bfloat16=27, int4=29,
)  # fmt: skip
NCHW, ND, NC1HWC0, FRACTAL_NZ, NCL = 0, 2, 3, 29, 47
# Status codes (contract.md, above a).
NULL, INVALID, TILING, INNER = 161001, 161002, 561103, 561000
BEFORE = (
    "x", "weight1", "weight2", "expert_tokens", "bias1", "bias2", "scale", "offset", "deq_scale1",
    "deq_scale2", "antiquant_scale1", "antiquant_scale2", "antiquant_offset1", "antiquant_offset2",
)  # fmt: skip
SOC = {"ascend910b": b"Ascend910B1", "ascend310p": b"Ascend310P3"}

ffn_ops.emulator.enable(operators=False)
RUNTIME, OBJECTS, OPERATORS = (
    ctypes.CDLL(str(ffn_ops.emulator.CANN / f"lib{name}.so")) for name in ("ascendcl", "nnopbase", "opapi")
)
OBJECTS.aclCreateTensor.restype = OBJECTS.aclCreateIntArray.restype = ctypes.c_void_p
RUNTIME.aclGetRecentErrMsg.restype = ctypes.c_char_p
I64, U64, POINTER = ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p


def message() -> str:
    return RUNTIME.aclGetRecentErrMsg().decode()


class Device:
    """Memory, objects and a stream; all of them end with the context."""

    def __init__(self, stack: contextlib.ExitStack, target: str) -> None:
        self.stack = stack
        RUNTIME.emulator_configure(SOC[target], 2)
        stack.callback(RUNTIME.emulator_configure, SOC["ascend910b"], 2)
        self.stream = self.new_stream(0)

    def new_stream(self, device: int) -> POINTER:
        """Leaves device 0 current."""
        stream = POINTER()
        assert RUNTIME.aclrtSetDevice(device) == 0
        assert RUNTIME.aclrtCreateStream(ctypes.byref(stream)) == 0
        assert RUNTIME.aclrtSetDevice(0) == 0
        self.stack.callback(RUNTIME.aclrtDestroyStream, stream)
        return stream

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """What is made inside ends with it."""
        outer = self.stack
        with contextlib.ExitStack() as self.stack:
            yield
        self.stack = outer

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

    def tensor(
        self,
        memory: POINTER,
        dtype: str,
        shape: Sequence[int],
        strides: Sequence[int] | None = None,
        offset: int = 0,
        storage: Sequence[int] | None = None,
        format: int = ND,
    ) -> POINTER:
        """An aclTensor; dense without strides, all of its storage without a storage shape."""

        def sizes(values: Sequence[int]) -> ctypes.Array[I64]:
            return (I64 * len(values))(*values)

        storage = shape if storage is None else storage
        made = OBJECTS.aclCreateTensor(
            sizes(shape), U64(len(shape)), DTYPE[dtype], None if strides is None else sizes(strides),
            I64(offset), format, sizes(storage), U64(len(storage)), memory,
        )  # fmt: skip
        assert made
        self.stack.callback(OBJECTS.aclDestroyTensor, POINTER(made))
        return POINTER(made)

    def hollow(
        self, dtype: str, shape: Sequence[int], format: int = ND, memory: POINTER | None = None
    ) -> POINTER:
        """A tensor whose elements are all the same one, so that any shape fits."""
        return self.tensor(memory or self.memory(16), dtype, shape, [0] * len(shape), 0, [1], format)

    def int_array(self, values: Sequence[int]) -> POINTER:
        made = OBJECTS.aclCreateIntArray((I64 * len(values))(*values), U64(len(values)))
        assert made
        self.stack.callback(OBJECTS.aclDestroyIntArray, POINTER(made))
        return POINTER(made)

    def phase1(
        self,
        tensors: dict[str, POINTER],
        activation: str | None,
        inner_precise: int,
        tokens_index_flag: bool = False,
        *,
        version: str = "V3",
        answers: tuple[bool, bool] = (True, True),
    ) -> tuple[int, U64, POINTER]:
        """`tensors` holds y too, and for V1 ("") and V2 an aclIntArray as expert_tokens. `answers`: whether
        there is room for the workspace size and for the executor."""
        size, executor = U64(), POINTER()
        places = [ctypes.byref(size) if answers[0] else None, ctypes.byref(executor) if answers[1] else None]
        flag = [ctypes.c_bool(tokens_index_flag)] if version else []
        status = getattr(OPERATORS, f"aclnnFFN{version}GetWorkspaceSize")(
            *(tensors.get(name) for name in BEFORE), None if activation is None else activation.encode(),
            I64(inner_precise), *flag, tensors.get("y"), *places,
        )  # fmt: skip
        return status, size, executor

    def phase2(self, size: U64, executor: POINTER, version: str = "V3") -> int:
        """The status of the launch, or else of the work."""
        workspace = self.memory(size.value) if size.value else None
        launch = getattr(OPERATORS, f"aclnnFFN{version}")
        return launch(workspace, size, executor, self.stream) or RUNTIME.aclrtSynchronizeStream(self.stream)


@contextlib.contextmanager
def device(target: str = "ascend910b") -> Iterator[Device]:
    with contextlib.ExitStack() as stack:
        yield Device(stack, target)
