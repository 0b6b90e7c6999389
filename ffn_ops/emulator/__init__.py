# SPDX-License-Identifier: Apache-2.0
"""CANN without an NPU: torch_npu, unmodified, on emulated devices in host memory. README.md beside this file.

    import ffn_ops.emulator
    ffn_ops.emulator.enable()  # before torch_npu
    torch.randn(2, 3).npu()

The libraries are in cann/, built from csrc/emulator; operators.py builds the one that needs torch's C++ ABI.
"""

import contextlib
import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

CANN = Path(__file__).with_name("cann")
# In the order in which they need each other; torch_npu finds them by their names once they are loaded.
LIBRARIES = (
    "ascendcl",
    "acl_op_compiler",
    "nnopbase",
    "opapi",
    "hccl",
    "ge_runner",
    "graph",
    "acl_tdt_channel",
)
# Whom torch_npu 2.13 knows (torch_npu/csrc/core/npu/NpuVariables.h in its wheel; of the many Ascend950, one).
SOCS = (
    "Ascend910B1", "Ascend910B2", "Ascend910B2C", "Ascend910B3", "Ascend910B4", "Ascend910B4-1",
    "Ascend910_9362", "Ascend910_9363", "Ascend910_9372", "Ascend910_9381", "Ascend910_9382",
    "Ascend910_9391", "Ascend910_9392", "Ascend310P1", "Ascend310P2", "Ascend310P3", "Ascend310P4",
    "Ascend310P5", "Ascend310P7", "Ascend310B1", "Ascend310B2", "Ascend310B3", "Ascend310B4", "Ascend910A",
    "Ascend910B", "Ascend910ProA", "Ascend910ProB", "Ascend910PremiumA", "Ascend950PR_9599",
)  # fmt: skip
# What enable() was given once it succeeded, or None; ffn_ops/doctor.py examines the same in another process.
enabled: tuple[str, int, bool] | None = None
_runtime: ctypes.CDLL | None = None


def enable(soc: str = "Ascend910B1", devices: int = 2, operators: bool = True) -> None:
    """Puts the emulated CANN into this process, then imports torch_npu if it is installed.

    `soc` is what aclrtGetSocName answers, one of SOCS; `devices` how many there are, 1 to 64.
    `operators=False` leaves out everything but the FFN operators, which saves building it (a minute, once for
    each torch). Raises RuntimeError when another CANN or torch_npu is loaded already, or when it was enabled
    with other arguments.
    """
    global enabled, _runtime
    if enabled is not None:
        if enabled != (soc, devices, operators):
            raise RuntimeError(
                f"the emulator is enabled with soc, devices, operators = {enabled}, but a process has one "
                "set of devices (start another process for others)"
            )
        return
    if "torch_npu" in sys.modules:
        raise RuntimeError(
            "torch_npu is loaded already, but the emulator must come before it (call enable() first)"
        )
    if soc not in SOCS:
        raise ValueError(f"soc is {soc!r}, but torch_npu knows only {', '.join(SOCS)} (name one of them)")
    _check("devices", devices, 1, 64)
    missing = [name for name in LIBRARIES if not (CANN / f"lib{name}.so").exists()]
    if missing:
        raise ImportError(
            f"the emulator is not built: lib{missing[0]}.so is missing in {CANN} (run `make build`)"
        )
    loaded = [ctypes.CDLL(str(CANN / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES]
    _runtime = loaded[0]
    _runtime.emulator_configure(soc.encode(), devices)
    # A missing operator raises at its call, instead of failing later in a queue (its other modes look for
    # aclop).
    os.environ.setdefault("ACL_OP_INIT_MODE", "2")
    if operators:
        from ffn_ops.emulator.operators import load

        load()
    if find_spec("torch_npu"):
        with warnings.catch_warnings():  # invalid escapes and the like: not the affair of who emulates CANN
            warnings.simplefilter("ignore")
            import_module("torch_npu")
    enabled = (soc, devices, operators)


def _check(name: str, value: int, least: int, most: int) -> None:
    if not isinstance(value, int) or not least <= value <= most:
        raise ValueError(
            f"{name} is {value!r}, but it must be an int from {least} to {most} (choose one in that range)"
        )


def library() -> ctypes.CDLL:
    """The emulated libascendcl.so; RuntimeError before enable()."""
    if _runtime is None:
        raise RuntimeError("the emulator is not enabled (call ffn_ops.emulator.enable() first)")
    return _runtime


def _text(function: str, size: int) -> str:
    buffer = ctypes.create_string_buffer(size)
    getattr(library(), function)(buffer, ctypes.c_size_t(size))
    return buffer.value.decode()


def counters() -> dict[str, int]:
    """What happened since enable(): calls, allocations, launches, synchronizations, device_to_host_copies,
    host_to_device_copies; and what is alive now: live_bytes of device memory, live_aclTensor,
    live_aclOpExecutor, live_stream, live_event and so on. Absent names read as 0."""
    found = Counters()
    for line in _text("emulator_counters", 1 << 16).splitlines():
        name, value = line.split()
        found[name] = int(value)
    return found


class Counters(dict[str, int]):
    def __missing__(self, name: str) -> int:
        return 0


@contextlib.contextmanager
def trace() -> Iterator[list[str]]:
    """The names of all ABI calls in the block, in order, from every thread; filled when the block ends."""
    names: list[str] = []
    library().emulator_start_trace()
    try:
        yield names
    finally:
        stop = library().emulator_stop_trace
        stop.restype = ctypes.c_size_t
        names.extend(_text("emulator_read_trace", stop() + 1).splitlines())


class Failure:
    """What fail_at failed: `name` of the call, or None when fewer calls matched (none, perhaps: trace() shows
    what calls are named)."""

    @property
    def name(self) -> str | None:
        return _text("emulator_failed", 256) or None


@contextlib.contextmanager
def fail_at(k: int, pattern: str = "*") -> Iterator[Failure]:
    """Within the block, the k-th ABI call (from 1) whose name matches the shell pattern fails with a status.
    Nothing happens when no such call comes: assert on the `name` of what this yields.

    A call that fails on torch_npu's queue thread ends that queue: torch_npu reports the error once, and then
    drops every launch of the process without a word, so that results are stale memory. Phase 2 of an operator
    runs there, and with TASK_QUEUE_ENABLE=2 phase 1 too (1 is the default). Such a test needs a process of
    its own, or TASK_QUEUE_ENABLE=0, with which the call itself raises and the next one works.
    """
    _check("k", k, 1, 2**31 - 1)
    library().emulator_fail_at(ctypes.c_long(k), pattern.encode())
    try:
        yield Failure()
    finally:
        library().emulator_fail_at(ctypes.c_long(0), b"*")


@contextlib.contextmanager
def slow(launch_us: int = 0, task_us: int = 0) -> Iterator[None]:
    """Within the block, each operator's launch holds its thread, and each task its stream, for so many
    microseconds: what only works by luck fails."""
    _check("launch_us", launch_us, 0, 2**31 - 1)
    _check("task_us", task_us, 0, 2**31 - 1)
    library().emulator_slow(launch_us, task_us)
    try:
        yield
    finally:
        library().emulator_slow(0, 0)
