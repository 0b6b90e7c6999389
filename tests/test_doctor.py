# SPDX-License-Identifier: Apache-2.0
"""`python -m ffn_ops doctor` as a user runs it, and what it says about machines unlike this one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ffn_ops import doctor


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
    )


def test_a_healthy_installation_exits_0_and_says_what_it_found() -> None:
    result = run("-m", "ffn_ops", "doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    for fact in (torch.__version__, "(in use)", str(torch.get_num_threads()), "torch_npu", "CANN"):
        assert fact in result.stdout
    assert "healthy" in result.stdout


def test_an_instruction_set_that_does_not_exist_exits_1_with_a_sentence() -> None:
    result = run("-m", "ffn_ops", "doctor", FFN_OPS_ISA="avx1024")
    assert result.returncode == 1
    assert "FFN_OPS_ISA is avx1024" in result.stdout
    assert "healthy" not in result.stdout


def test_a_wrong_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_computes", lambda device: False)
    _, (problem,) = doctor.examine()
    assert "wrong answer" in problem


def test_another_torch_is_called_untested() -> None:
    assert doctor._describe_torch("2.13.0+cpu") == "2.13.0+cpu"
    for other in ("2.10.1", "2.130.0", "2.14.0"):
        assert doctor._describe_torch(other).startswith(f"{other} (untested")


def test_cann_is_found_by_its_variables_with_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_load", lambda name: None)
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
    assert "not found" in doctor._cann()
    assert str(tmp_path) in doctor._cann()  # a missing library lists every path that was tried
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libopapi.so").touch()
    assert doctor._cann() == f"unknown version in {tmp_path}"
    info = tmp_path / "aarch64-linux" / "ascend_toolkit_install.info"
    info.parent.mkdir()
    info.write_text("package_name=Ascend-cann-toolkit\nversion=8.2.RC1\ninnerversion=V100R001\n")
    assert doctor._cann() == f"8.2.RC1 in {tmp_path}"


def test_a_library_beside_an_unsourced_cann_is_pointed_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.setattr(doctor.ctypes, "CDLL", refuse)  # other tests may have loaded the emulator's
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libhccl.so").touch()
    sentences = {sentence.split()[0]: sentence for sentence in doctor._missing_libraries()}
    assert f"(source {tmp_path}/set_env.sh)" in sentences["libhccl.so"]
    assert "(install CANN" in sentences["libascendcl.so"]


@pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is installed here")
def test_without_torch_npu_an_expected_npu_is_a_problem_and_the_cpu_none() -> None:
    result = run("-m", "ffn_ops", "doctor", "--npu")
    assert result.returncode == 1
    assert "torch_npu is not installed, but tensors reach an NPU through it (pip install" in result.stdout
    assert run("-m", "ffn_ops", "doctor").returncode == 0


def test_a_missing_typer_is_named() -> None:
    hide = "import runpy, sys; sys.modules['typer'] = None; runpy.run_module('ffn_ops', run_name='__main__')"
    result = run("-c", hide)
    assert result.returncode == 1
    assert result.stderr == (
        "python -m ffn_ops needs typer, which this Python does not have (pip install typer)\n"
    )
