# SPDX-License-Identifier: Apache-2.0
"""Runs a program in a process of its own: environment variables are read once, and after an error in
torch_npu's queue a process is of no more use."""

import os
import subprocess
import sys
from pathlib import Path

from ffn_ops import emulator

ROOT = Path(__file__).parents[2]
PACKAGE = Path(emulator.__file__).parents[2]  # the build under test, which need not be the checkout's
SETUP = """
import sys
sys.path[:0] = ["tests/npu", {package!r}]
from ffn_ops import emulator
emulator.enable(soc={soc!r}, operators={operators})
import torch
from operands import close, on_cpu, op, operands
"""


def run(
    program: str, soc: str = "Ascend910B1", operators: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The program sees emulator, torch, and what operands.py defines."""
    setup = SETUP.format(package=str(PACKAGE), soc=soc, operators=operators)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", setup + program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=300,
    )
