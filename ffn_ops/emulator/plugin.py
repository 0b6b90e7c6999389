# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: `pytest -p ffn_ops.emulator.plugin` enables the emulator before any test module is
imported, and the fixture `emulator` fails a test that leaks a descriptor or an executor of aclnn."""

import gc
from collections.abc import Iterator
from types import ModuleType

import pytest

import ffn_ops.emulator

ffn_ops.emulator.enable()


def _live() -> dict[str, int]:
    import torch

    torch.npu.synchronize()  # torch_npu's: the queue destroys what it was given
    gc.collect()
    counters = ffn_ops.emulator.counters()
    return {name: count for name, count in counters.items() if name.startswith("live_acl") and count}


@pytest.fixture
def emulator() -> Iterator[ModuleType]:
    """ffn_ops.emulator, for its counters, trace, fail_at and slow."""
    before = _live()
    yield ffn_ops.emulator
    after = _live()
    assert after == before, f"aclnn objects that were not destroyed: {after}, before the test {before}"
