# SPDX-License-Identifier: Apache-2.0
"""`python -m ffn_ops doctor --npu` on healthy and broken Ascend set-ups, each in a process of its own.

A folder of the emulator's libraries on the loader's path stands for an installed CANN.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch_npu

from ffn_ops import emulator

ROOT = Path(__file__).parents[2]


def doctor(*options: str, cann: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH" and "ASCEND" not in k}
    if cann:
        environment["LD_LIBRARY_PATH"] = str(cann)
    command = [sys.executable, "-m", "ffn_ops", "doctor", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture
def cann(tmp_path: Path) -> Path:
    """The emulated CANN, to be broken."""
    for library in emulator.CANN.glob("*.so"):
        (tmp_path / library.name).write_bytes(library.read_bytes())
    return tmp_path


def rename(library: Path, symbol: bytes, other: bytes) -> None:
    code = library.read_bytes()
    assert symbol in code and len(symbol) == len(other)
    library.write_bytes(code.replace(symbol, other))


def test_a_healthy_npu_path_exits_0_and_says_that_it_is_emulated(cann: Path) -> None:
    result = doctor("--npu", cann=cann)
    assert result.returncode == 0, result.stdout + result.stderr
    for fact in (
        torch_npu.__version__,
        "emulated",
        "Ascend910B1",
        "right on npu:0",
        "not found (no version.info",
    ):
        assert fact in result.stdout
    assert "The CPU path and the NPU path are healthy." in result.stdout


def test_in_a_process_with_the_emulator_enabled_it_is_examined() -> None:
    code = (
        "from ffn_ops import emulator, doctor; emulator.enable('Ascend310P3', 1, False); "
        "facts, problems = doctor.examine(npu=True); "
        "assert not problems and facts['devices'] == '1' and facts['SoC'] == 'Ascend310P3', (facts, problems)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_torch_npu_without_cann_names_every_library_and_what_it_is_for() -> None:
    result = doctor("--npu")
    assert result.returncode == 1
    assert "the NPU path fails at its step 'torch_npu': lib" in result.stdout
    for library in ("libascendcl.so", "libhccl.so", "libnnopbase.so", "libopapi.so"):
        assert f"{library} does not load, but it holds" in result.stdout
    assert "looked in /usr/local/Ascend" in result.stdout and "set_env.sh" in result.stdout
    healthy = doctor()
    assert healthy.returncode == 0 and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in healthy.stdout


def test_a_missing_operator_library_is_the_only_one_named(cann: Path) -> None:
    (cann / "libopapi.so").unlink()
    result = doctor("--npu", cann=cann)
    assert result.returncode == 1
    assert "fails at its step 'small call'" in result.stdout
    assert f"libopapi.so: cannot open shared object file: No such file or directory; looked in {cann}" in (
        result.stdout
    )
    assert "libhccl.so does not load" not in result.stdout


def test_a_cann_too_old_for_v3_is_told_by_the_missing_function(cann: Path) -> None:
    rename(cann / "libopapi.so", b"aclnnFFNV3", b"aclnnFFNX3")
    result = doctor("--npu", cann=cann)
    assert result.returncode == 1
    assert "fails at its step 'small call': CANN's aclnnFFNV3GetWorkspaceSize, aclnnFFNV3 were not found" in (
        result.stdout
    )
    assert "libopapi.so (loaded, without it)" in result.stdout and "install CANN 8" in result.stdout


def test_a_crash_is_reported_with_its_signal(cann: Path) -> None:
    code = (
        "import os, signal, subprocess, sys\n"
        "from ffn_ops import doctor\n"
        "doctor.sys.executable = sys.argv[1]\n"
        "print(doctor._examine_npu()[1][0])"
    )
    crash = cann / "python"
    crash.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crash.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-c", code, str(crash)], capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout == "the NPU path fails at its step 'torch_npu': the process died of SIGSEGV\n"
