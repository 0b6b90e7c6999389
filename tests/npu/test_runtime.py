# SPDX-License-Identifier: Apache-2.0
"""The emulated runtime, through its C ABI and torch_npu: memory, copies, streams, events, test aids."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from operands import op, operands
from process import ROOT, run

from ffn_ops import emulator

TO_DEVICE, TO_HOST = 1, 2  # aclrtMemcpyKind


@pytest.fixture
def acl() -> ctypes.CDLL:
    """libascendcl.so, with device 0 current on this thread."""
    library = emulator.library()
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    assert library.aclrtSetDevice(0) == 0
    return library


def allocate(acl: ctypes.CDLL, size: int = 64) -> ctypes.c_void_p:
    pointer = ctypes.c_void_p()
    assert acl.aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(size), 0) == 0
    return pointer


def copy(
    acl: ctypes.CDLL, to: object, source: object, size: int, kind: int, capacity: int | None = None
) -> tuple[int, str]:
    status = acl.aclrtMemcpy(
        to, ctypes.c_size_t(size if capacity is None else capacity), source, ctypes.c_size_t(size), kind
    )
    return status, acl.aclGetRecentErrMsg().decode()


def test_fresh_memory_is_poisoned_and_freed_memory_is_refused(acl: ctypes.CDLL):
    device, host = allocate(acl), ctypes.create_string_buffer(64)
    assert copy(acl, host, device, 64, TO_HOST)[0] == 0
    assert host.raw == b"\xfb" * 64
    assert acl.aclrtFree(device) == 0
    assert copy(acl, host, device, 64, TO_HOST)[0] == 107000
    assert acl.aclrtFree(device) == 107000
    assert b"is not the start of live device memory" in acl.aclGetRecentErrMsg()


def test_copies_must_say_what_they_do(acl: ctypes.CDLL):
    device, host = allocate(acl), ctypes.create_string_buffer(128)
    for status, message in (
        copy(acl, device, host, 64, TO_HOST),  # the wrong way round
        copy(acl, host, host, 64, TO_DEVICE),
        copy(acl, device, host, 65, TO_DEVICE),  # past the allocation's end
        copy(acl, device, host, 64, TO_DEVICE, capacity=63),
        copy(acl, device, host, 64, 9),
    ):
        assert status == 107000 and message.startswith("aclrtMemcpy: ")
    assert acl.aclGetRecentErrMsg() == b""  # read once
    acl.aclrtFree(device)


def test_the_host_cannot_touch_device_memory():
    died = run("x = torch.ones(4).npu()\nimport ctypes\nctypes.string_at(x.data_ptr(), 1)")
    assert died.returncode == -11  # SIGSEGV


@pytest.mark.parametrize(
    ("make", "destroy"),
    [("aclrtCreateStream", "aclrtDestroyStream"), ("aclrtCreateEvent", "aclrtDestroyEvent")],
)
def test_handles_die_once(acl: ctypes.CDLL, make: str, destroy: str):
    handle = ctypes.c_void_p()
    assert getattr(acl, make)(ctypes.byref(handle)) == 0
    assert getattr(acl, destroy)(handle) == 0
    assert getattr(acl, destroy)(handle) == 107017


def test_a_stream_belongs_to_its_device(acl: ctypes.CDLL):
    stream, device = ctypes.c_void_p(), allocate(acl)
    assert acl.aclrtCreateStream(ctypes.byref(stream)) == 0
    assert acl.aclrtSetDevice(1) == 0
    assert acl.aclrtMemsetAsync(device, ctypes.c_size_t(64), 0, ctypes.c_size_t(64), stream) == 107003
    assert acl.aclrtSetDevice(0) == 0
    assert acl.aclrtMemsetAsync(device, ctypes.c_size_t(64), 0, ctypes.c_size_t(64), stream) == 0
    assert acl.aclrtDestroyStream(stream) == 0
    assert acl.aclrtSetDevice(2) == 107001
    acl.aclrtFree(device)


def test_events_order_streams():
    first, second = torch.npu.Stream(), torch.npu.Stream()
    x, event = torch.zeros(1000).npu(), torch.npu.Event()
    torch.npu.synchronize()
    with emulator.slow(task_us=5000):
        with torch.npu.stream(first):
            for _ in range(5):
                x += 1
            event.record()
        with torch.npu.stream(second):
            event.wait()
            y = x * 2
    second.synchronize()
    assert (y.cpu() == 10).all() and event.query()


def test_counters_and_trace_see_a_call():
    x, weight1, weight2 = operands()
    op(x, weight1[0], weight2[0], "gelu")
    torch.npu.synchronize()
    before = emulator.counters()
    with emulator.trace() as calls:
        y = op(x, weight1[0], weight2[0], "gelu")
        y.cpu()
    after = emulator.counters()
    assert calls.index("aclnnFFNV3GetWorkspaceSize") < calls.index("aclnnFFNV3")
    assert after["launches"] == before["launches"] + 1
    assert after["device_to_host_copies"] == before["device_to_host_copies"] + 1
    assert after["calls"] - before["calls"] == len(calls)
    assert after["live_aclTensor"] == before["live_aclTensor"]


def test_fail_at_counts_what_matches():
    x, weight1, weight2 = operands()
    with emulator.fail_at(2, "aclCreateT*") as failure:
        with pytest.raises(RuntimeError, match="aclCreateTensor: injected failure"):
            op(x, weight1[0], weight2[0], "gelu")
        assert failure.name == "aclCreateTensor"
    with emulator.fail_at(99, "aclCreateT*") as failure:
        op(x, weight1[0], weight2[0], "gelu")
        assert failure.name is None


@pytest.mark.parametrize(
    "misuse",
    [lambda: emulator.enable(devices=3), lambda: emulator.enable(soc="Ascend310P3")],
)
def test_a_process_has_one_set_of_devices(misuse: Callable[[], None]):
    emulator.enable()  # the same again is fine
    with pytest.raises(RuntimeError, match=r"^the emulator is enabled with"):
        misuse()


def test_the_runner_runs_a_script_that_knows_nothing_of_it(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\nprint(sys.argv[1:], torch.npu.device_count(), (torch.ones(2).npu() + 1).cpu())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "ffn_ops.emulator", "--devices", "3", str(script), "a"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "['a'] 3 tensor([2., 2.])" in done.stdout, done.stderr


def test_the_plugin_fails_a_test_that_leaks(tmp_path: Path):
    (tmp_path / "test_leak.py").write_text(
        """
import ctypes

def test_leaks(emulator):
    emulator.library().aclrtGetSocName()
    dims = (ctypes.c_int64 * 1)(2)
    nnopbase = ctypes.CDLL("libnnopbase.so")
    one = ctypes.c_uint64(1)
    nnopbase.aclCreateTensor(dims, one, 1, None, ctypes.c_int64(0), 2, dims, one, None)

def test_does_not(emulator):
    import torch
    assert (torch.ones(2).npu() + 1).sum().item() == 4
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "ffn_ops.emulator.plugin", "test_leak.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "2 passed, 1 error" in done.stdout and "live_aclTensor" in done.stdout, done.stdout
