# SPDX-License-Identifier: Apache-2.0
"""What is installed, what runs here, and what is wrong: `python -m ffn_ops doctor [--npu]` prints it.

The CPU path is examined in this process. The NPU's is in another one, which reports each step as it is done:
a broken driver or CANN may end a process, and then the last step says where.
"""

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

import ffn_ops
import ffn_ops._native as _native

TESTED_TORCH = "2.13"  # what the test suite runs on; build-system.requires and constraints.txt name the same
ASCEND = Path("/usr/local/Ascend")  # where the vendor's installers put everything by default
# What each of CANN's libraries is for here. The order is that in which they need each other.
LIBRARIES = {
    "libascendcl.so": "devices, memory and streams; without it neither torch_npu nor torch with it imports",
    "libhccl.so": "communication; without it torch_npu, which is linked with it, cannot be imported",
    "libnnopbase.so": "tensors and executors of aclnn operators; without it no operator of an NPU runs",
    "libopapi.so": "the aclnn operators; without it no operator of an NPU runs",
}
STEPS = ("torch_npu", "devices", "SoC", "small call")


def examine(npu: bool = False) -> tuple[dict[str, str], list[str]]:
    """Facts by name, and problems: none when the CPU path is healthy and, if `npu`, that of npu:0 too."""
    problems: list[str] = []
    try:
        selected = _native.selected_isa()
    except RuntimeError as error:
        selected = "none"
        problems.append(str(error))
    else:
        with ffn_ops.target("cpu"):
            healthy = _computes("cpu")
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
        "driver": _driver(),
    }
    if npu:
        found, wrong = _examine_npu()
        facts |= found
        problems += wrong
    return facts, problems


def _computes(device: str) -> bool:
    """One call with small integers, which every instruction set and every device must get exactly right."""
    x = torch.arange(-6.0, 6.0).reshape(3, 4)
    weight1, weight2 = (
        torch.arange(-10.0, 10.0).reshape(4, 5),
        torch.arange(-2.0, 2.0, 0.2).round().reshape(5, 4),
    )
    y = torch.ops.ffn.ffn(*(t.half().to(device) for t in (x, weight1, weight2)), "relu")
    return torch.equal(y.cpu().float(), (x @ weight1).relu() @ weight2)


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
        version = metadata.version("torch-npu")
    except metadata.PackageNotFoundError:
        return "not installed"
    if _load("libascendcl.so"):
        return version
    return f"{version} (without CANN `import torch` fails, unless TORCH_DEVICE_BACKEND_AUTOLOAD=0)"


def _roots() -> list[Path]:
    """Where CANN may be: by its variables, then the installers' folders."""
    named = (os.environ.get(name) for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"))
    return [*(Path(root) for root in named if root), ASCEND / "ascend-toolkit" / "latest", ASCEND / "latest"]


def _cann() -> str:
    """CANN's version and folder; the emulator's library can be told by a function of its own."""
    library = _load("libascendcl.so")
    if hasattr(library, "emulator_configure"):
        return "emulated (ffn_ops.emulator: not an NPU)"
    for root in _roots():
        if (root / "lib64" / "libopapi.so").exists():
            return f"{_version(root) or 'unknown version'} in {root}"
    where = ", ".join(str(root / "lib64") for root in _roots())
    return "on the loader's paths" if library else f"not found (no libopapi.so in {where})"


def _load(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _version(root: Path) -> str | None:
    """From the files in which the vendor's packages write version=..., or Version=..."""
    files = [*root.glob("*-linux/ascend_toolkit_install.info"), root / "version.cfg", root / "version.info"]
    for file in [*files, root / "opp" / "version.info"]:
        if not file.exists():
            continue
        for line in file.read_text(errors="replace").splitlines():
            key, _, value = line.partition("=")
            if key.strip().lower() == "version" and value:
                return value.strip()
    return None


def _driver() -> str:
    root = ASCEND / "driver"
    return _version(root) or f"not found (no version.info in {root})"


def _examine_npu() -> tuple[dict[str, str], list[str]]:
    """The steps of probe() in a process of its own, as facts and at most one problem with its explanation."""
    if _torch_npu() == "not installed":
        return {}, [
            "torch_npu is not installed, but tensors reach an NPU through it (pip install 'ffn-ops[npu]' for "
            "CANN's version; the CPU path works without)"
        ]
    emulated = getattr(sys.modules.get("ffn_ops.emulator"), "enabled", None)
    code = f"from ffn_ops import doctor; doctor.probe({emulated!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         cwd=Path(ffn_ops.__file__).parents[1])  # fmt: skip
    facts: dict[str, str] = {}
    for line in run.stdout.splitlines():
        if line.startswith('{"step"'):  # beside what torch_npu prints
            step = json.loads(line)
            facts[step["step"]] = step["fact"]
    error = facts.pop("error", None)
    if run.returncode == 0:
        return facts, []
    stopped = next(step for step in STEPS if step not in facts)
    if error is None:
        died = run.returncode
        error = f"the process died of {signal.Signals(-died).name}" if died < 0 else f"exit code {died}"
    return facts, [f"the NPU path fails at its step '{stopped}': {error}", *_missing_libraries()]


def _missing_libraries() -> Iterator[str]:
    """One sentence for each library of CANN that does not load: what for, and where it was looked for."""
    folders = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
    for name, purpose in LIBRARIES.items():
        try:
            ctypes.CDLL(name)
        except OSError as error:
            where = ", ".join([*folders, *(str(root / "lib64") for root in _roots())])
            beside = [root for root in _roots() if (root / "lib64" / name).exists()]
            fix = f"source {beside[0]}/set_env.sh" if beside else "install CANN and source its set_env.sh"
            yield f"{name} does not load, but it holds {purpose}: {error}; looked in {where} ({fix})"


def probe(emulated: tuple[str, int, bool] | None) -> None:
    """Run by _examine_npu in a process of its own: prints each step that is done, or the error of the first
    that fails. `emulated`: what the parent's emulator was enabled with."""

    def done(step: str, fact: str) -> None:
        print("\n" + json.dumps({"step": step, "fact": fact}), flush=True)

    try:
        if emulated is not None:
            from ffn_ops.emulator import enable

            enable(*emulated)
        import torch_npu

        done("torch_npu", torch_npu.__version__)
        count = torch.npu.device_count()
        if count == 0:
            raise RuntimeError("torch_npu finds no device (check the driver with npu-smi info)")
        done("devices", str(count))
        done("SoC", torch.npu.get_device_name(0))
        if not _computes("npu:0"):
            raise RuntimeError("a small call on npu:0 gives a wrong answer (report it)")
        done("small call", "right on npu:0")
    except Exception as error:
        done("error", str(error))
        sys.exit(1)
