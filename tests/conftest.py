# SPDX-License-Identifier: Apache-2.0
"""Settings of every test run: Hypothesis profiles, and which build of ffn_ops is under test."""

import os
from importlib.util import find_spec

from hypothesis import settings

# Before NumPy is imported: the reference gains nothing from BLAS threads, and loses much beside torch.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Times are the machine's affair, so no deadline. `ci` draws the same examples in every run.
settings.register_profile("dev", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_report_header() -> str:
    package = find_spec("ffn_ops")
    return f"ffn_ops: {list(package.submodule_search_locations or []) if package else 'not found'}"
