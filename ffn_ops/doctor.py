# SPDX-License-Identifier: Apache-2.0
"""Facts about this installation, and what is wrong with it. `python -m ffn_ops doctor` prints them."""

import ctypes.util
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import ffn_ops
import ffn_ops._native as _native

TESTED_TORCH = "2.13"  # what the test suite runs on; build-system.requires and constraints.txt name the same


def examine() -> tuple[dict[str, str], list[str]]:
    """Facts by name, and problems: none when the CPU path is healthy. torch_npu and CANN are facts only."""
    problems: list[str] = []
    try:
        selected = _native.selected_isa()
    except RuntimeError as error:
        selected = "none"
        problems.append(str(error))
    else:
        with ffn_ops.target("cpu"):
            healthy = _computes()
        if not healthy:
            problems.append(
                f"a small call on {selected} gives a wrong answer (report it, and set FFN_OPS_ISA=generic)"
            )
    try:
        target = ffn_ops.current_target()
    except ffn_ops.ContractError as error:
        target = "none"
        problems.append(str(error))
    facts = {
        "ffn_ops": f"{ffn_ops.__version__} in {Path(ffn_ops.__file__).parent}",
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": _describe_torch(str(torch.__version__)),
        "instruction sets": ", ".join(_describe_isa(name, found, selected) for name, found in _native.isas()),
        "target": target,
        "threads": str(torch.get_num_threads()),
        "torch_npu": _torch_npu(),
        "CANN": _cann(),
    }
    return facts, problems


def _computes() -> bool:
    """One call with small integers, which every instruction set must get exactly right."""
    x = torch.arange(-6.0, 6.0).reshape(3, 4)
    weight1, weight2 = torch.arange(-10.0, 10.0).reshape(4, 5), torch.arange(-9.0, 11.0).reshape(5, 4)
    y = torch.ops.ffn.ffn(x, weight1, weight2, "relu")
    return torch.equal(y, (x @ weight1).relu() @ weight2)


def _describe_torch(version: str) -> str:
    tested = version.startswith(TESTED_TORCH + ".")
    return version if tested else f"{version} (untested: ffn_ops is tested with torch {TESTED_TORCH})"


def _describe_isa(name: str, found: bool, selected: str) -> str:
    if name == selected:
        return f"{name} (in use)"
    return name if found else f"{name} (not on this machine)"


def _torch_npu() -> str:
    """From its metadata: importing torch_npu without CANN fails."""
    try:
        return metadata.version("torch-npu")
    except metadata.PackageNotFoundError:
        return "not installed"


def _cann() -> str:
    """Where CANN's operator library is: by its variables, in the usual folder, or on the loader's paths."""
    roots = [os.environ[name] for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if os.environ.get(name)]
    roots.append("/usr/local/Ascend/ascend-toolkit/latest")
    for root in roots:
        if Path(root, "lib64", "libopapi.so").exists():
            return root
    library = ctypes.util.find_library("opapi")
    return library or f"not found (no lib64/libopapi.so in {', '.join(roots)})"
