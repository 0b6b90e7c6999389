# SPDX-License-Identifier: Apache-2.0
"""Misuse of the emulated runtime's C ABI and of aclnn's objects: each gets a status and a message. Calls that
crashed once run in a child. tests/npu/test_runtime.py has what torch_npu does with the runtime."""

import ctypes
import os
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from emulated import (
    I64,
    INNER,
    INVALID,
    OBJECTS,
    OPERATORS,
    POINTER,
    RUNTIME,
    TILING,
    U64,
    Device,
    device,
    message,
)

ONE = np.eye(2, dtype=np.float16)
OBJECTS.aclCreateTensorList.restype = RUNTIME.aclCreateTensorDesc.restype = ctypes.c_void_p
MEBIBYTE = 1 << 20


def in_child(case: Callable[[Device], object]) -> str:
    """What a forked child makes of the case, as text with the message behind it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with device() as d:
                os.write(writing, f"{case(d)} {message()}".encode())
                os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, "the child died"
    return said


def event() -> POINTER:
    made = POINTER()
    assert RUNTIME.aclrtCreateEvent(ctypes.byref(made)) == 0
    return made


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("aclrtGetDeviceCount", lambda d: (None,)),
        ("aclrtGetDevice", lambda d: (None,)),
        ("aclrtGetCurrentContext", lambda d: (None,)),
        ("aclrtDeviceGetBareTgid", lambda d: (None,)),
        ("aclrtCreateStream", lambda d: (None,)),
        ("aclrtCreateEvent", lambda d: (None,)),
        ("aclrtMallocHost", lambda d: (None, U64(8))),
        ("aclrtGetMemInfo", lambda d: (0, None, None)),
        ("aclGetDeviceCapability", lambda d: (0, 0, None)),
        ("aclrtDeviceCanAccessPeer", lambda d: (None, 0, 1)),
        ("aclrtStreamQuery", lambda d: (d.stream, None)),
        ("aclrtStreamGetId", lambda d: (d.stream, None)),
        ("aclrtQueryEventStatus", lambda d: (event(), None)),
        ("aclrtEventElapsedTime", lambda d: (None, event(), event())),
        ("aclrtGetSysParamOpt", lambda d: (0, None)),
        ("aclGetTensorDescDimV2", lambda d: (None, U64(0), None)),
    ],
)
def test_results_without_a_place(function: str, arguments: Callable[[Device], tuple[object, ...]]) -> None:
    said = in_child(lambda d: getattr(RUNTIME, function)(*arguments(d)))
    assert said.startswith("107000 acl") and said.endswith(": a pointer for the result is null")


def tensor_of_rank(rank: int) -> object:
    dims = (I64 * 2)(2, 2)
    return OBJECTS.aclCreateTensor(dims, U64(rank), 1, None, I64(0), 2, dims, U64(1), None)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (lambda d: tensor_of_rank(2**64 - 1), "None aclCreateTensor: "),
        (lambda d: tensor_of_rank(2**61), "None aclCreateTensor: "),
        (lambda d: OBJECTS.aclCreateIntArray((I64 * 1)(), U64(2**61)), "None aclCreateIntArray: "),
        (lambda d: OBJECTS.aclCreateTensorList((I64 * 1)(), U64(2**62)), "None aclCreateTensorList: "),
        (lambda d: RUNTIME.aclCreateTensorDesc(1, 2, None, 2), "None aclCreateTensorDesc: "),
        (lambda d: RUNTIME.aclGetTensorDescType(None), "-1 "),
        (lambda d: RUNTIME.aclrtMallocHost(ctypes.byref(POINTER()), U64(2**64 - 1)), "207001 "),
        (lambda d: RUNTIME.aclrtMalloc(ctypes.byref(POINTER()), U64(64 << 30 | 1), 0), "207001 "),
    ],
)  # fmt: skip
def test_senseless_sizes(case: Callable[[Device], object], expected: str) -> None:
    assert in_child(case).startswith(expected)


def test_only_touched_memory_takes_room() -> None:
    """Three GiB at once, poisoned wherever one looks."""
    with device() as d:
        start = time.monotonic()
        size = 3 << 30
        memory = d.memory(size)
        assert time.monotonic() - start < 1
        for offset in (0, 16 * MEBIBYTE - 2, size - 4):
            assert d.get(POINTER(memory.value + offset), np.zeros(4, np.uint8)).tolist() == [0xFB] * 4


def test_a_host_range_that_runs_into_device_memory() -> None:
    def case(d: Device) -> int:
        memory, eight = d.memory(4096), U64(16)
        return RUNTIME.aclrtMemcpy(memory, eight, POINTER(memory.value - 8), eight, 1)

    assert in_child(case).startswith("107000 aclrtMemcpy: source ")


@pytest.mark.parametrize("free", ["aclrtFree", "aclrtFreeHost"])
def test_freeing_waits_for_the_streams_of_all_devices(free: str) -> None:
    def case(d: Device) -> tuple[int, ...]:
        size, kind = U64(MEBIBYTE), 3 if free == "aclrtFree" else 1
        source = POINTER()
        if free == "aclrtFree":
            assert RUNTIME.aclrtMalloc(ctypes.byref(source), size, 0) == 0
        else:
            assert RUNTIME.aclrtMallocHost(ctypes.byref(source), size) == 0
        stream = d.new_stream(1)
        assert RUNTIME.aclrtSetDevice(1) == 0
        target = d.memory(MEBIBYTE)
        RUNTIME.emulator_slow(0, 100000)
        copied = RUNTIME.aclrtMemcpyAsync(target, size, source, size, kind, stream)
        return copied, getattr(RUNTIME, free)(source), RUNTIME.aclrtSynchronizeStream(stream)

    assert in_child(case).startswith("(0, 0, 0)")


def of_device_1(d: Device, make: Callable[[], POINTER]) -> POINTER:
    assert RUNTIME.aclrtSetDevice(1) == 0
    made = make()
    assert RUNTIME.aclrtSetDevice(0) == 0
    return made


def test_memory_of_another_device() -> None:
    with device() as d:
        memory = of_device_1(d, lambda: d.put(ONE))
        assert RUNTIME.aclrtMemset(memory, U64(8), 0, U64(8)) == 107000
        tensors = {name: d.tensor(d.put(ONE), "float16", (2, 2)) for name in ("x", "weight1", "y")}
        tensors["weight2"] = d.tensor(memory, "float16", (2, 2))
        assert d.phase1(tensors, "relu", 1)[0] == INVALID
        assert "weight2 at" in message()
        status, size, executor = d.phase1(tensors | {"weight2": tensors["x"]}, "relu", 1)
        assert status == 0
        workspace = of_device_1(d, lambda: d.memory(size.value))
        assert OPERATORS.aclnnFFNV3(workspace, size, executor, d.stream) == INNER
        assert "is not in one live allocation of the current device" in message()


def test_without_a_device() -> None:
    def case(d: Device) -> tuple[int, ...]:
        made = event()
        results: list[int] = []  # of a thread of its own, which has no device

        def calls() -> None:
            results.append(RUNTIME.aclrtSynchronizeStream(None))
            results.append(RUNTIME.aclrtRecordEvent(made, None))
            results.append(RUNTIME.aclrtSynchronizeDevice())

        thread = threading.Thread(target=calls)
        thread.start()
        thread.join()
        return tuple(results)

    assert in_child(case).startswith("(107002, 107002, 107002)")


def test_initialising_and_ending_twice() -> None:
    calls = ("aclFinalize", "aclInit", "aclInit", "aclFinalize", "aclFinalize")
    said = in_child(lambda d: [getattr(RUNTIME, name)(None) for name in calls])
    assert said.startswith("[100001, 0, 100002, 0, 100037]")


@pytest.mark.parametrize(
    ("tensor", "status"),
    [
        (lambda d, x: x, 0),
        (lambda d, x: d.tensor(d.put(ONE), "float16", (2, 2)), 0),
        (lambda d, x: d.tensor(d.put(ONE), "float16", (4, 1)), INVALID),
        (lambda d, x: d.tensor(d.put(ONE), "float16", (2, 2), (1, 2)), INVALID),
        (lambda d, x: d.tensor(d.put(ONE), "int8", (2, 2)), INVALID),
        (lambda d, x: POINTER(0x10), INVALID),
        (lambda d, x: None, TILING),
    ],
)
def test_new_addresses_are_for_the_same_layout(
    tensor: Callable[[Device, POINTER], POINTER | None], status: int
) -> None:
    def case(d: Device) -> int:
        tensors = {name: d.tensor(d.put(ONE), "float16", (2, 2)) for name in ("x", "weight1", "weight2", "y")}
        assert d.phase1(tensors, "relu", 1)[0] == 0
        executor = d.phase1(tensors, "relu", 1)[2]
        assert OBJECTS.aclSetAclOpExecutorRepeatable(executor) == 0
        return OBJECTS.aclSetInputTensorAddr(executor, U64(0), tensor(d, tensors["x"]), d.put(ONE))

    assert in_child(case).startswith(f"{status} ")


def test_an_executor_is_for_its_operator() -> None:
    with device() as d:
        tensors = {name: d.tensor(d.put(ONE), "float16", (2, 2)) for name in ("x", "weight1", "weight2", "y")}
        status, size, executor = d.phase1(tensors, "relu", 1)
        assert status == 0
        assert OPERATORS.aclnnFFN(d.memory(size.value), size, executor, d.stream) == INNER
        assert message() == "aclnnFFN: the executor is one of aclnnFFNV3"


@pytest.mark.parametrize("value", [-1, 99, 12345, -(2**31)])
def test_dtypes_and_formats_that_are_none(value: int) -> None:
    """The sanitizers see that they are not loaded as enums."""
    with device() as d:
        tensors = {name: d.tensor(d.put(ONE), "float16", (2, 2)) for name in ("x", "weight1", "weight2", "y")}
        tensors["x"] = d.tensor(d.put(ONE), "float16", (2, 2), format=value)
        assert d.phase1(tensors, "relu", 1)[0] == INVALID
        dims, two = (I64 * 2)(2, 2), U64(2)
        made = POINTER(OBJECTS.aclCreateTensor(dims, two, value, None, I64(0), 2, dims, two, d.put(ONE)))
        assert d.phase1(tensors | {"x": made}, "relu", 1)[0] == INVALID
        assert OBJECTS.aclDestroyTensor(made) == 0


def test_the_test_aids_take_anything() -> None:
    def case(d: Device) -> int:
        RUNTIME.emulator_slow(-1, -1)
        assert RUNTIME.aclrtMemsetAsync(d.memory(8), U64(8), 0, U64(8), d.stream) == 0
        assert RUNTIME.aclrtSynchronizeStream(d.stream) == 0
        RUNTIME.emulator_fail_at(ctypes.c_long(1), None)
        return RUNTIME.aclrtSynchronizeStream(d.stream)

    assert in_child(case).startswith("507899 ")
