# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels of each instruction set as reference.ffn and reference.moe; over ffn_ops._native."""

import ctypes
import platform
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from tolerance import Kernel

from ffn_ops import _native


def _emulate() -> ctypes.CDLL | None:
    """What does the work of instructions that an x86-64 machine lacks."""
    if all(supported for _, supported in _native.isas()) or platform.machine() != "x86_64":
        return None
    with TemporaryDirectory() as folder:
        library = Path(folder, "instructions.so")
        source = Path(__file__).with_name("instructions.cc")
        subprocess.run(["c++", "-O3", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


HARDWARE_ISAS = [name for name, supported in _native.isas() if supported]
EMULATED = _emulate()
SUPPORTED_ISAS = [name for name, supported in _native.isas() if supported]
# A trap for each 64 products takes minutes.
SLOW_ISAS = [name for name in SUPPORTED_ISAS if name not in HARDWARE_ISAS and name.endswith("vnni")]
each_isa = pytest.mark.parametrize(
    "isa",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_ISAS else []) for name in SUPPORTED_ISAS],
)
# For the bound of each, and by mode how many rows of an expert take another multiplication than fewer.
KERNELS = {
    name: Kernel(flushes=name in ("amx", "avx512_bf16", "neon_i8mm"), splits=name == "amx")
    for name in SUPPORTED_ISAS
}
BOUNDARY = {
    name: dict.fromkeys(("w8a16", "w8a16_bf16", "w4a16", "w4a16_bf16"), 16) for name in SUPPORTED_ISAS
}
if "amx" in BOUNDARY:
    BOUNDARY["amx"]["fp16"] = 24
if "avx512_bf16" in BOUNDARY:
    BOUNDARY["avx512_bf16"] = {"w8a16": 49, "w8a16_bf16": 49, "w4a16": 32, "w4a16_bf16": 32}
_INT4 = np.dtype(ml_dtypes.int4)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def native_ffn(
    x: np.ndarray,
    weight1: np.ndarray,
    weight2: np.ndarray,
    activation: str,
    expert_tokens: np.ndarray | None = None,
    *,
    tokens_index_flag: bool = False,
    inner_precise: int | None = None,
    output_dtype: npt.DTypeLike | None = None,
    isa: str | None = None,
    threads: int = 1,
    cache_bytes: int = 0,
    packed: bool = False,
    activate_left: bool = False,
    **operands: np.ndarray | None,
) -> np.ndarray:
    """reference.ffn with the kernels of `isa`, divided among `threads` workers, each with so large a cache
    (0: the machine's); reference.moe where topk_ids and topk_weights are among the operands. Weights may be
    transposed; with `packed` they are prepacked first."""
    dtype = np.dtype(output_dtype or (np.float16 if x.dtype == np.int8 else x.dtype))
    y = np.empty((*x.shape[:-1], weight2.shape[-1]), dtype)
    operands |= {"x": x, "out": y, "weight1": weight1, "weight2": weight2, "expert_tokens": expert_tokens}
    pairs = {name: _pair(array) for name, array in operands.items() if array is not None}
    for name in ("weight1", "weight2") if packed else ():
        pairs[name] = np.frombuffer(_native.prepack(pairs[name], isa), np.uint8), "uint8"
    _native.ffn(
        activation=activation, tokens_index_flag=tokens_index_flag, inner_precise=inner_precise,
        isa=isa, threads=threads, cache_bytes=cache_bytes, activate_left=activate_left, **pairs,
    )  # fmt: skip
    return y


def _pair(array: np.ndarray) -> tuple[Any, str]:
    name = array.dtype.name
    if array.dtype == _INT4:
        nibbles = array.astype(np.int8).view(np.uint8) & 15
        return np.ascontiguousarray(nibbles[..., 0::2] | nibbles[..., 1::2] << 4), name
    return array.view(np.uint16) if array.dtype in (_BFLOAT16, np.float16) else array, name
