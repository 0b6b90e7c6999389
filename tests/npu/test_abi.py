# SPDX-License-Identifier: Apache-2.0
"""Our own declarations of CANN's C ABI against the vendor's: the headers that ship with torch_npu."""

import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
(VENDOR,) = (
    find_spec("torch_npu") or pytest.fail("torch_npu is not installed")
).submodule_search_locations or ()
RUNTIME = sorted((ROOT / "csrc" / "emulator" / "runtime").glob("*.cc"))


def check(source: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = ["c++", "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'csrc'}", *flags, str(source)]
    return subprocess.run(command, capture_output=True, text=True)


VENDOR_FLAGS = ("-DFFN_OPS_VENDOR_ACL", f"-isystem{VENDOR}/include")


@pytest.mark.parametrize("source", RUNTIME, ids=lambda path: path.name)
def test_every_function_has_the_vendors_prototype(source: Path):
    result = check(source, *VENDOR_FLAGS)
    assert result.returncode == 0, result.stderr


def test_the_comparison_can_fail(tmp_path: Path):
    wrong = tmp_path / "wrong.cc"
    wrong.write_text(
        '#include "aclnn/acl.h"\nextern "C" aclError aclrtFree(void* memory, int more) { return more; }\n'
    )
    assert check(wrong, *VENDOR_FLAGS).returncode != 0


CONSTANTS = [
    "ACL_FLOAT",
    "ACL_FLOAT16",
    "ACL_INT8",
    "ACL_INT32",
    "ACL_UINT8",
    "ACL_INT16",
    "ACL_UINT16",
    "ACL_UINT32",
    "ACL_INT64",
    "ACL_UINT64",
    "ACL_DOUBLE",
    "ACL_BOOL",
    "ACL_COMPLEX64",
    "ACL_COMPLEX128",
    "ACL_BF16",
    "ACL_INT4",
    "ACL_COMPLEX32",
    "ACL_FORMAT_NCHW",
    "ACL_FORMAT_ND",
    "ACL_FORMAT_FRACTAL_NZ",
    "ACL_FORMAT_NCDHW",
    "ACL_FORMAT_NCL",
    "ACL_FORMAT_NC1HWC0",
    "ACL_FORMAT_FRACTAL_Z",
    "ACL_FORMAT_NDC1HWC0",
    "ACL_FORMAT_FRACTAL_NZ_C0_16",
    "ACL_FORMAT_FRACTAL_NZ_C0_8",
    "ACL_FRACTAL_Z_3D",
    "ACL_MEMCPY_HOST_TO_DEVICE",
    "ACL_MEMCPY_DEVICE_TO_HOST",
    "ACL_MEMCPY_DEVICE_TO_DEVICE",
    "ACL_MEM_MALLOC_NORMAL_ONLY",
]


def test_constants_have_the_vendors_values(tmp_path: Path):
    """The values that one set of headers gives, asserted under the other."""
    values = tmp_path / "values.cc"
    values.write_text(
        '#include "aclnn/acl.h"\n#include <cstdio>\nint main() {\n'
        + "".join(f'  std::printf("%d ", static_cast<int>({name}));\n' for name in CONSTANTS)
        + "}\n"
    )
    printed = []
    for flags in ((), VENDOR_FLAGS):
        program = tmp_path / "values"
        subprocess.run(["c++", "-std=c++17", f"-I{ROOT / 'csrc'}", *flags, values, "-o", program], check=True)
        printed.append(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
    assert printed[0] == printed[1] and len(printed[0].split()) == len(CONSTANTS)
