# SPDX-License-Identifier: Apache-2.0
"""A C program (c_example.c) builds against our header alone and runs on the emulator's libraries alone."""

import subprocess
from pathlib import Path

import numpy as np

import ffn_ops.emulator

HERE = Path(__file__).parent
CANN = ffn_ops.emulator.CANN


def test_c_example(tmp_path: Path) -> None:
    program = tmp_path / "example"
    libraries = ["-lopapi", "-lnnopbase", "-lascendcl"]
    subprocess.run(
        ["cc", "-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Werror", f"-I{HERE.parent / 'csrc'}",
         str(HERE / "c_example.c"), "-o", str(program), f"-L{CANN}", f"-Wl,-rpath,{CANN}", *libraries],
        check=True,
    )  # fmt: skip
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    y = np.array([int(line, 16) for line in result.stdout.split()], np.uint16).view(np.float16).reshape(4, 2)
    x = np.array([[1, 2], [-1, 0], [3, 1], [0, 0.5]])
    hidden = np.maximum(x @ [[1, -1], [0, 1]], 0)
    np.testing.assert_array_equal(y, hidden @ [[2, 0], [0, 1]])
