# SPDX-License-Identifier: Apache-2.0
"""What is shipped: the symbols _op.so needs from torch, what `import ffn_ops` loads, and the wheel itself."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ffn_ops

ROOT = Path(__file__).parents[1]
LIBRARY = Path(ffn_ops.__file__).with_name("_op.so")
SHIMS = set((ROOT / "tests" / "stable_shims_2_10.txt").read_text().splitlines())


def needed_of_torch(symbols: str) -> set[str]:
    """Of nm's lines, the undefined symbols that are torch's: C shims, and C++ names from its namespaces."""
    undefined = re.findall(r" U (\S+)", symbols)
    return {name for name in undefined if re.match(r"aoti_|torch_|_ZNK?(2at|3c10|5torch)", name)}


def test_the_operator_needs_only_the_c_shims_of_torch_2_10() -> None:
    symbols = subprocess.run(["nm", "-D", LIBRARY], check=True, capture_output=True, text=True).stdout
    needed = needed_of_torch(symbols)
    assert needed, "an operator library that needs nothing of torch is not being read right"
    assert needed <= SHIMS, f"not in torch 2.10: {sorted(needed - SHIMS)}"


@pytest.mark.parametrize("name", ["torch_set_device", "_ZN3c105ErrorC2E", "_ZNK5torch6Tensor3dimEv"])
def test_the_symbol_check_can_fail(name: str) -> None:
    assert not needed_of_torch(f"                 U {name}\n                 U memcpy\n") <= SHIMS


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a statement loads beyond `import torch`, without the standard library."""
    program = f"import sys, torch; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    run = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT
    )
    modules = {name.partition(".")[0] for name in run.stdout.split()}
    return modules - set(sys.stdlib_module_names)


def test_import_loads_torch_and_nothing_heavy() -> None:
    assert loaded_by("import ffn_ops") <= {"ffn_ops", "torch"}


def test_the_import_check_can_fail() -> None:
    assert "rich" in loaded_by("import ffn_ops, rich.console")


@pytest.mark.slow
def test_the_wheel_installs_and_runs_in_a_clean_environment(tmp_path: Path) -> None:
    def run(*command: object) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    run(sys.executable, *pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    assert f"-cp{sys.version_info.major}{sys.version_info.minor}-" in wheel.name  # per Python version

    run(sys.executable, "-m", "venv", "clean")
    python = tmp_path / "clean" / "bin" / "python"
    run(python, *pip, "install", "--constraint", ROOT / "constraints.txt", wheel)
    run(python, "-m", "ffn_ops", "doctor")  # makes a call and checks it
    program = "import ffn_ops, ffn_ops._native; print(ffn_ops.__file__)"
    assert run(python, "-c", program).startswith(str(tmp_path / "clean"))


def test_an_import_without_the_compiled_modules_says_how_to_build_them(tmp_path):
    package = tmp_path / "ffn_ops"
    shutil.copytree(LIBRARY.parent, package, ignore=shutil.ignore_patterns("*.so", "emulator", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", "import ffn_ops"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "ImportError: ffn_ops is not built: _op.so is missing" in done.stderr
