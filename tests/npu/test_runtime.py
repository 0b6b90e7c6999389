# SPDX-License-Identifier: Apache-2.0
"""The emulated runtime, through its C ABI and torch_npu: memory, copies, streams, events, test aids."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu
from operands import op, operands
from process import PACKAGE, run

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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"soc": "Ascend999"},
            r"soc is 'Ascend999', but torch_npu knows only Ascend910B1, .*\(name one of them\)",
        ),
        ({"soc": 910}, "soc is 910, but torch_npu knows only "),
        ({"devices": "2"}, "devices is '2', but it must be an int from 1 to 64 "),
        ({"devices": 65}, "devices is 65, but it must be an int from 1 to 64 "),
    ],
)
def test_devices_that_cannot_be_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], said: str
):
    monkeypatch.setattr(emulator, "enabled", None)
    monkeypatch.delitem(sys.modules, "torch_npu")
    with pytest.raises(ValueError, match="^" + said):
        emulator.enable(**arguments)
    assert emulator.enabled is None


def test_an_enable_that_fails_does_not_count(monkeypatch: pytest.MonkeyPatch):
    def fails(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(emulator, "enabled", None)
    monkeypatch.delitem(sys.modules, "torch_npu")
    monkeypatch.setattr(emulator, "import_module", fails)
    for _ in range(2):
        with pytest.raises(ImportError, match="torch_npu"):
            emulator.enable()


def test_torch_npu_knows_every_soc_that_can_be_chosen():
    known = (Path(torch_npu.__file__).parent / "lib" / "libtorch_npu.so").read_bytes()
    assert [soc for soc in emulator.SOCS if b"\0" + soc.encode() + b"\0" not in known] == []


@pytest.mark.parametrize(
    ("aid", "said"),
    [
        (lambda: emulator.slow(task_us=-5), "task_us is -5, but it must be an int from 0 "),
        (lambda: emulator.slow(0.5), "launch_us is 0.5, but it must be an int from 0 "),
        (lambda: emulator.fail_at(0), "k is 0, but it must be an int from 1 "),
        (lambda: emulator.fail_at(1.5), "k is 1.5, but it must be an int from 1 "),
    ],
)
def test_aids_refuse_what_they_cannot_do(aid: Callable[[], AbstractContextManager[object]], said: str):
    with pytest.raises(ValueError, match="^" + said), aid():
        pass


def emulated(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "ffn_ops.emulator", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
    )


def test_the_runner_runs_a_script_that_knows_nothing_of_it(tmp_path: Path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "beside.py").write_text("x = 2")
    (folder / "script.py").write_text(
        "import beside, sys, torch\n"
        "print(sys.argv, torch.npu.device_count(), (torch.ones(beside.x).npu() + 1).cpu())"
    )
    done = emulated("--devices", "3", "scripts/script.py", "-m", folder=tmp_path)
    assert "['scripts/script.py', '-m'] 3 tensor([2., 2.])" in done.stdout, done.stderr


def test_the_runner_runs_a_module(tmp_path: Path):
    (tmp_path / "test_device.py").write_text(
        "def test_device():\n    import torch\n    assert torch.npu.get_device_name() == 'Ascend310P3'"
    )
    done = emulated("--soc", "Ascend310P3", "-m", "pytest", "-q", "test_device.py", folder=tmp_path)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no.py"], "there is no script no.py"),
        (["-m", "no.such"], "there is no module no.such"),
        (["--soc", "Ascend999", __file__], "soc is 'Ascend999'"),
        ([], "there is nothing to run"),
    ],
)
def test_the_runner_says_what_it_cannot_run(tmp_path: Path, arguments: list[str], said: str):
    done = emulated(*arguments, folder=tmp_path)
    assert done.returncode == 2 and f"error: {said}" in done.stderr


def plugged(folder: Path, tests: str, *options: str, conftest: str = "") -> str:
    (folder / "test_it.py").write_text(tests)
    (folder / "conftest.py").write_text(conftest)
    plugin = [] if conftest else ["-p", "ffn_ops.emulator.plugin"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugin, *options, "test_it.py"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
    ).stdout


def test_the_plugin_fails_a_test_that_leaks(tmp_path: Path):
    said = plugged(
        tmp_path,
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
""",
    )
    assert "2 passed, 1 error" in said and "live_aclTensor" in said, said


ON_310P = """
import torch

def test_on_310p(emulator):
    assert (torch.npu.get_device_name(), torch.npu.device_count()) == ("Ascend310P3", 3)
"""


@pytest.mark.parametrize("where", ["ini", "conftest"])
def test_the_plugin_has_the_devices_that_a_suite_chooses(tmp_path: Path, where: str):
    if where == "ini":
        said = plugged(tmp_path, ON_310P, "-o", "ffn_ops_soc=Ascend310P3", "-o", "ffn_ops_devices=3")
    else:
        said = plugged(
            tmp_path,
            ON_310P,
            conftest="import ffn_ops.emulator\nffn_ops.emulator.enable('Ascend310P3', 3)\n"
            "pytest_plugins = ['ffn_ops.emulator.plugin']",
        )
    assert "1 passed" in said, said


ENDS_THE_PROCESS = {
    # Phase 2 fails on torch_npu's thread.
    "torch_npu's queue stopped at an error, and drops every launch since": """
    with pytest.raises(RuntimeError, match="Inner error"), emulator.fail_at(1, "aclnnInplaceFillScalar"):
        x.fill_(2)
        torch.npu.synchronize()
""",
    # The task itself fails.
    "a task failed, and so does each synchronisation since": """
    x.index_select(0, torch.tensor([7]).npu())
    with pytest.raises(RuntimeError, match="aclnnIndexSelect"):
        torch.npu.synchronize()
""",
}


@pytest.mark.parametrize("said", ENDS_THE_PROCESS)
def test_the_plugin_notices_that_a_process_is_of_no_more_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
):
    monkeypatch.delenv("TASK_QUEUE_ENABLE", raising=False)
    code = "import pytest, torch\n\ndef test_fails(emulator):\n    x = torch.ones(3).npu()\n"
    code += ENDS_THE_PROCESS[said] + "\ndef test_is_the_victim(emulator):\n    pass\n"
    out = plugged(tmp_path, code)
    assert "1 passed, 2 errors" in out and said in out, out
