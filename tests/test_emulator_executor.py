# SPDX-License-Identifier: Apache-2.0
"""Between the two phases of the emulated aclnnFFN: workspace sizes (contract.md section f) and the life of an
executor (section g)."""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from emulated import INNER, INVALID, NULL, OBJECTS, OPERATORS, POINTER, RUNTIME, TILING, U64, Device, device

SYSTEM = 16777216
SYNC = 20 * 2 * 32  # cube cores * 2 * 32 bytes
QUANT = {"scale": ("float32", 1), "offset": ("float32", 1)}
PER_CHANNEL = {**QUANT, "scale": ("float32", 48)}


def deq(dtype: str) -> dict[str, tuple[str, int]]:
    return {"deq_scale1": (dtype, 48), "deq_scale2": (dtype, 32)}


def antiquant(dtype: str) -> dict[str, tuple[str, int]]:
    return {f"antiquant_{name}{n}": (dtype, N) for name in ("scale", "offset") for n, N in ((1, 48), (2, 32))}


# M = 501, K1 = N2 = 32, N1 = K2 = 48: M * N1 = 24048. The parts are ws1, ws2 and what else section f lists.
@pytest.mark.parametrize(
    ("x", "weight", "y", "inner_precise", "vectors", "parts"),
    [
        ("float16", "float16", "float16", 1, {}, (48096, 48096)),
        ("float16", "float16", "float16", 0, {}, (96192, 48096)),
        ("bfloat16", "bfloat16", "bfloat16", 0, {}, (96192, 48096)),
        ("int8", "int8", "float16", 0, QUANT | deq("uint64"), (48096, 24048)),
        ("int8", "int8", "float16", 0, PER_CHANNEL | deq("int64"), (48096, 24048)),
        # Both rounded up to 64, and 8 bytes for each deq_scale.
        ("int8", "int8", "float16", 0, QUANT | deq("float32"), (48128, 24064, 384, 256)),
        ("int8", "int8", "bfloat16", 0, QUANT | deq("bfloat16"), (96192, 24048, 501 * 32 * 4)),
        ("int8", "int8", "bfloat16", 0, PER_CHANNEL | deq("bfloat16"), (96192, 24048, 501 * 32 * 4)),
        # Room for both weights in 16 bits, twice.
        ("float16", "int8", "float16", 0, antiquant("float16"), (48096, 48096, 6144, 6144)),
        ("bfloat16", "int4", "bfloat16", 0, antiquant("bfloat16"), (96192, 48096, 6144, 6144)),
    ],
)
def test_workspace_sizes(
    x: str,
    weight: str,
    y: str,
    inner_precise: int,
    vectors: dict[str, tuple[str, int]],
    parts: tuple[int, ...],
) -> None:
    specs = {"x": (x, (501, 32)), "weight1": (weight, (32, 48)), "weight2": (weight, (48, 32))}
    specs |= {name: (dtype, (size,)) for name, (dtype, size) in vectors.items()} | {"y": (y, (501, 32))}
    assert workspace(specs, "relu", inner_precise) == rounded(*parts, SYNC, SYSTEM)


def workspace(
    specs: dict[str, tuple[str, tuple[int, ...]]],
    activation: str,
    inner_precise: int,
    soc: str = "ascend910b",
) -> int:
    with device(soc) as d:
        tensors = {name: d.hollow(*spec) for name, spec in specs.items()}
        status, size, executor = d.phase1(tensors, activation, inner_precise)
        assert status == 0
        assert OBJECTS.aclDestroyAclOpExecutor(executor) == 0
        return size.value


def rounded(*parts: int) -> int:
    return (sum(parts) + 32 + 511) & ~511


def fp16(M: int, N1: int = 48) -> dict[str, tuple[str, tuple[int, ...]]]:
    shapes = {"x": (M, 32), "weight1": (32, N1), "weight2": (48, 32), "y": (M, 32)}
    return {name: ("float16", shape) for name, shape in shapes.items()}


def test_workspace_sizes_of_other_shapes() -> None:
    assert workspace(fp16(501), "relu", 1, "ascend310p") == rounded(48096, SYNC, SYSTEM)  # no ws1
    assert workspace(fp16(0), "relu", 1) == 0  # nothing to do
    # One tile of both halves of x W1 on each of 40 vector cores, then the activated half. The tile, which the
    # vendor's tiling chooses, is 128 x 256 here, or what there is of it.
    tiles, hidden = 128 * 48 * 2 * 4 * 40, 501 * 48 * 2
    assert workspace(fp16(501, 96), "swiglu", 1) == rounded(tiles, hidden, SYSTEM)


def test_workspace_size_with_experts() -> None:
    """Of these terms, only float32 deq_scales' have an E: 8 bytes for each."""
    shapes = {"x": (501, 32), "weight1": (2, 32, 48), "weight2": (2, 48, 32)}
    specs = {name: ("int8", shape) for name, shape in shapes.items()}
    specs |= {"expert_tokens": ("int64", (2,)), "scale": ("float32", (2,)), "offset": ("float32", (2,))}
    specs |= {name: (dtype, (2, N)) for name, (dtype, N) in deq("float32").items()}
    specs["y"] = ("float16", (501, 32))
    assert workspace(specs, "relu", 0) == rounded(48128, 24064, 768, 512, SYNC, SYSTEM)


ONE, TWO = np.eye(2, dtype=np.float16), np.full((2, 2), 2, np.float16)


def small(d: Device) -> tuple[dict[str, POINTER], POINTER]:
    """The tensors of y = relu(1 * 1) * 1 in 2 x 2, and y's memory, all 0."""
    memory = d.put(0 * ONE)
    tensors = {name: d.tensor(d.put(ONE), "float16", (2, 2)) for name in ("x", "weight1", "weight2")}
    return tensors | {"y": d.tensor(memory, "float16", (2, 2))}, memory


def prepared(d: Device) -> tuple[U64, POINTER]:
    status, size, executor = d.phase1(small(d)[0], "relu", 1)
    assert status == 0
    return size, executor


def test_repeatable_executors_and_new_addresses() -> None:
    with device() as d:
        tensors, memory = small(d)
        other = d.put(0 * ONE)
        status, size, executor = d.phase1(tensors, "relu", 1)
        assert status == 0 and OBJECTS.aclSetAclOpExecutorRepeatable(executor) == 0
        assert d.phase2(size, executor) == 0 and d.phase2(size, executor) == 0
        assert OPERATORS.aclnnFFNV3(None, size, executor, d.stream) == INNER  # and it lives on
        assert OBJECTS.aclSetInputTensorAddr(executor, ctypes.c_size_t(0), tensors["x"], d.put(TWO)) == 0
        assert OBJECTS.aclSetOutputTensorAddr(executor, ctypes.c_size_t(0), tensors["y"], other) == 0
        assert OBJECTS.aclSetInputTensorAddr(executor, ctypes.c_size_t(3), tensors["x"], other) == INVALID
        assert d.phase2(size, executor) == 0
        assert OBJECTS.aclDestroyAclOpExecutor(executor) == 0
        assert OBJECTS.aclDestroyAclOpExecutor(executor) == INVALID
        assert d.phase2(size, executor) == INNER
        np.testing.assert_array_equal(d.get(memory, ONE), ONE)
        np.testing.assert_array_equal(d.get(other, ONE), TWO)
        assert OBJECTS.aclSetAclOpExecutorRepeatable(None) == TILING
        assert OBJECTS.aclDestroyAclOpExecutor(None) == TILING


def test_a_one_shot_executor_runs_once() -> None:
    with device() as d:
        size, executor = prepared(d)
        assert OBJECTS.aclSetInputTensorAddr(executor, ctypes.c_size_t(0), small(d)[0]["x"], d.memory(8)) != 0
        assert d.phase2(size, executor) == 0
        assert d.phase2(size, executor) == INNER
        assert OBJECTS.aclSetAclOpExecutorRepeatable(executor) == INVALID
        assert OPERATORS.aclnnFFNV3(None, U64(0), None, d.stream) == INNER


def destroyed(d: Device) -> POINTER:
    stream = d.new_stream(0)
    assert RUNTIME.aclrtDestroyStream(stream) == 0
    return stream


@pytest.mark.parametrize(
    ("workspace", "missing", "stream"),
    [
        (lambda d, n: None, 0, lambda d: d.stream),
        (lambda d, n: None, "all", lambda d: d.stream),
        (lambda d, n: d.memory(n), 1, lambda d: d.stream),
        (lambda d, n: d.memory(n - 1), 0, lambda d: d.stream),
        (lambda d, n: POINTER(ctypes.addressof(HOST)), 0, lambda d: d.stream),
        (lambda d, n: d.memory(n), 0, lambda d: d.new_stream(1)),  # while device 0 is current
        (lambda d, n: d.memory(n), 0, lambda d: POINTER(ctypes.addressof(HOST))),
        (lambda d, n: d.memory(n), 0, destroyed),
    ],
    ids=[
        "null workspace", "no workspace", "short size", "short memory", "host memory",
        "other device", "no stream", "destroyed stream",
    ],
)  # fmt: skip
def test_a_launch_that_is_refused_ends_the_executor(
    workspace: Callable[[Device, int], POINTER | None],
    missing: int | str,
    stream: Callable[[Device], POINTER],
) -> None:
    with device() as d:
        tensors, memory = small(d)
        status, size, executor = d.phase1(tensors, "relu", 1)
        assert status == 0
        said = U64(0 if missing == "all" else size.value - int(missing))
        assert OPERATORS.aclnnFFNV3(workspace(d, size.value), said, executor, stream(d)) == INNER
        assert OBJECTS.aclDestroyAclOpExecutor(executor) == INVALID
        assert RUNTIME.aclrtSynchronizeStream(d.stream) == 0
        assert not d.get(memory, ONE).any()


HOST = ctypes.create_string_buffer(64)


def test_memory_freed_before_the_launch() -> None:
    """Nothing on a device would tell."""
    with device() as d:
        tensors = small(d)[0]
        gone = d.put(ONE)
        tensors["x"] = d.tensor(gone, "float16", (2, 2))
        status, size, executor = d.phase1(tensors, "relu", 1)
        assert status == 0 and RUNTIME.aclrtFree(gone) == 0
        assert d.phase2(size, executor) == INVALID


def test_destroyed_objects_are_refused() -> None:
    with device() as d:
        tensors = small(d)[0]
        tensors["expert_tokens"] = d.int_array([2])
        assert OBJECTS.aclDestroyIntArray(tensors["expert_tokens"]) == 0
        assert OBJECTS.aclGetIntArraySize(tensors["expert_tokens"], ctypes.byref(U64())) == INVALID
        assert d.phase1(tensors, "relu", 1, version="V2")[0] == INVALID
        del tensors["expert_tokens"]
        assert OBJECTS.aclDestroyTensor(tensors["weight2"]) == 0
        assert d.phase1(tensors, "relu", 1)[0] == INVALID
        assert d.phase1(tensors | {"weight2": None}, "relu", 1)[0] == NULL
