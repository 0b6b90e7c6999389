# SPDX-License-Identifier: Apache-2.0
"""Imports torch, for ffn_ops/__init__.py, also where torch_npu is installed without CANN.

There `import torch` raises: it loads torch_npu by itself, which needs CANN's libraries. ffn_ops has a CPU
path and an emulated CANN (ffn_ops.emulator), so it leaves torch_npu out of its import of torch if the first
of those libraries cannot be loaded. With CANN, and when torch is imported already, nothing is changed.
`python -m ffn_ops doctor` says what was found.
"""

import ctypes
import os
import sys
from importlib import import_module
from importlib.util import find_spec

VARIABLE = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def _cann_loads() -> bool:
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError:
        return False
    return True


if (
    "torch" not in sys.modules
    and os.environ.get(VARIABLE, "1") == "1"  # torch's default
    and find_spec("torch_npu")
    and not _cann_loads()
):
    os.environ[VARIABLE] = "0"
    try:
        import_module("torch")
    finally:
        os.environ[VARIABLE] = "1"
