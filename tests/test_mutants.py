# SPDX-License-Identifier: Apache-2.0
"""Tests of the tests: the kernels are built with one mistake each, and test_kernels.py must fail on every
one.

test_reference.py does the same with mistakes in NumPy, in seconds. These compile, so they are slow.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Mistake -> (file, what stands there once, what the mutant has instead, the test that must notice).
MUTANTS = {
    "nothing changed": ("csrc/cpu/ffn-inl.h", "value * scale", "value * scale", "test_every_mode"),
    "one rounding of Q is missing": (
        "csrc/cpu/ffn-inl.h",
        "Round(Rounding::kFp16, value * scale)",
        "value * scale",
        "test_w8a8_with_relu",
    ),
    "the intermediate of fp16 is rounded once too often": (
        "csrc/cpu/ffn.cc",
        "steps.first = high_precision ? Rounding::kNone : Rounding::kFp16;",
        "steps.first = Rounding::kFp16;",
        "test_every_16_bit_number",
    ),
    "the bias is dropped": (
        "csrc/cpu/ffn-inl.h",
        "return LoadFloats(sums) + LoadFloats(bias);",
        "return LoadFloats(sums);",
        "test_every_mode",
    ),
    "an expert takes the next one's first row": (
        "csrc/cpu/ffn.cc",
        "std::min(p.row_ends[expert], end) - row,",
        "std::min(p.row_ends[expert] + 1, end) - row,",
        "test_every_mode",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", list(MUTANTS))
def test_a_mistake_in_the_kernels_is_noticed(mistake: str, tmp_path: Path):
    file, right, wrong, test = MUTANTS[mistake]
    for name in ("csrc", "ffn_ops", "CMakeLists.txt"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    text = (tmp_path / file).read_text(encoding="utf-8")
    assert text.count(right) == 1, f"{file} no longer holds {right!r} once: choose another mistake"
    (tmp_path / file).write_text(text.replace(right, wrong), encoding="utf-8")

    scripts = Path(sys.executable).parent
    configure = [
        "-S",
        tmp_path,
        "-B",
        tmp_path / "build",
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={scripts / 'ninja'}",
    ]
    subprocess.run([scripts / "cmake", *configure, f"-DPython_EXECUTABLE={sys.executable}"], check=True)
    subprocess.run([scripts / "cmake", "--build", tmp_path / "build", "--target", "_native"], check=True)
    for module in (tmp_path / "build").glob("_native*.so"):
        shutil.copy(module, tmp_path / "ffn_ops")

    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-qxpno:cacheprovider", "-k", test, ROOT / "tests/test_kernels.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True, text=True,
    )  # fmt: skip
    noticed = run.returncode == 1 and "AssertionError" in run.stdout
    unchanged = run.returncode == 0 and " passed" in run.stdout
    assert unchanged if mistake == "nothing changed" else noticed, run.stdout + run.stderr
