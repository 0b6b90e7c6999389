# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: `pytest -p ffn_ops.emulator.plugin` enables the emulator before any conftest or test
module is imported, as the ini options ffn_ops_soc and ffn_ops_devices say.

The fixture `emulator` fails a test that leaks a descriptor or an executor of aclnn, or that leaves torch_npu
in a state in which no later test of the process means anything.
"""

import gc
from collections.abc import Iterator
from types import ModuleType

import pytest

import ffn_ops.emulator


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("ffn_ops_soc", "what the emulated NPUs are", default="Ascend910B1")
    parser.addini("ffn_ops_devices", "how many emulated NPUs there are", default="2")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    pytest_configure(early_config)


def pytest_configure(config: pytest.Config) -> None:
    """Leaves alone what a conftest enabled that has this in its pytest_plugins."""
    if ffn_ops.emulator.enabled is not None:
        return
    soc, devices = config.getini("ffn_ops_soc"), config.getini("ffn_ops_devices")
    try:
        ffn_ops.emulator.enable(soc, int(devices))
    except ValueError as error:
        raise pytest.UsageError(f"ffn_ops_soc = {soc}, ffn_ops_devices = {devices}: {error}") from None


def _live() -> dict[str, int]:
    import torch

    own_process = "(a test that provokes this needs a process of its own)"
    try:
        with ffn_ops.emulator.trace() as calls:
            torch.npu.Event().record()  # through torch_npu's queue
            torch.npu.synchronize()  # torch_npu's: the queue destroys what it was given
    except RuntimeError as error:
        pytest.fail(f"a task failed, and so does each synchronisation since {own_process}: {error}")
    if "aclrtRecordEvent" not in calls:
        pytest.fail(f"torch_npu's queue stopped at an error, and drops every launch since {own_process}")
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
