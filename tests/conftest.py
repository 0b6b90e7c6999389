# SPDX-License-Identifier: Apache-2.0
"""Settings of every test run: the device under test, Hypothesis profiles, and which build of ffn_ops it is.

`pytest` runs on the CPU; `pytest --device npu` runs what is listed below on NPU tensors of the emulator.
"""

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before NumPy is imported: the reference gains nothing from BLAS threads, and loses much beside torch.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Before torch: threads that wait for each other by spinning take the core of another test.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Times are the machine's affair, so no deadline. `ci` draws the same examples in every run.
settings.register_profile("dev", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

HERE = Path(__file__).parent
# What --device npu runs: the operator's own tests, and those that only torch_npu makes possible.
ON_NPU = {HERE / name for name in ("test_op.py", "test_bad_input.py", "test_compile.py", "npu")}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cpu", "npu"), default="cpu", help="where tensors live; npu: on the emulator"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_only: a matter of the CPU; --device npu leaves it out")
    device = config.getoption("device")
    os.environ["FFN_OPS_TEST_DEVICE"] = device  # strategies.py reads it
    if device == "npu":
        import ffn_ops.emulator

        ffn_ops.emulator.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.parent != HERE:
        return None
    if config.getoption("device") == "cpu":
        return True if collection_path.name == "npu" else None
    return None if collection_path in ON_NPU else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("device") == "npu":
        cpu_only = [item for item in items if item.get_closest_marker("cpu_only")]
        items[:] = [item for item in items if item not in cpu_only]
        config.hook.pytest_deselected(items=cpu_only)
        print(f"--device npu leaves out {len(cpu_only)} tests marked cpu_only")


def pytest_report_header(config: pytest.Config) -> str:
    package = find_spec("ffn_ops")
    found = list(package.submodule_search_locations or []) if package else "not found"
    return f"ffn_ops: {found}, tensors on the {config.getoption('device')}"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Many tiny products: threads would only wait for each other where other processes run."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Every call of torch.ops.ffn.ffn and ffn.moe: its arguments, by position and by name, and y."""
    import torch

    made: list[tuple[Any, ...]] = []

    def recording(op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            y = op(*args, **kwargs)
            made.append((args, kwargs, y))
            return y

        return call

    for name in ("ffn", "moe"):
        monkeypatch.setattr(torch.ops.ffn, name, recording(getattr(torch.ops.ffn, name)))
    yield made
