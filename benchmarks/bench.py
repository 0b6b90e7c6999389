# SPDX-License-Identifier: Apache-2.0
"""make bench: a feed-forward block by mode and rows, ours beside F.linear + activation + F.linear.

A first look: medians of interleaved calls on this machine. It asserts nothing; the tests do that.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from ffn_ops import FFN, _native, contract

MODES = ("float32", "bf16", "fp16", "w8a8", "w8a16_bf16", "w4a16_bf16")
ROWS = (1, 16, 128)
K1, K2 = 1024, 4096
SECONDS = 1.5  # for each of the two sides of a row of the table


def interleaved(calls: list[Callable[[], Tensor]]) -> list[float]:
    """Median milliseconds of each call, taken in turn so that the machine's moods meet all of them alike."""
    for call in calls:  # first calls load and allocate
        call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + SECONDS * len(calls)
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(taken) for taken in times]


def measure(mode: str, M: int) -> tuple[str, float, float]:
    """The baseline's dtype, its milliseconds, and ours. Integer modes are set beside float weights."""
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(K1, K2), nn.Linear(K2, K1)
    ours = FFN.from_linear(fc1, fc2, "gelu", mode, calibration=[torch.randn(256, K1)])
    (dtype,) = (row.x for row in contract.MODES if row.name == mode)
    baseline = "float32" if dtype == "int8" else dtype
    x = torch.randn(M, K1, dtype=getattr(torch, baseline))
    fc1, fc2 = fc1.to(x.dtype), fc2.to(x.dtype)

    def composite() -> Tensor:
        return fc2(F.gelu(fc1(x), approximate="tanh"))

    theirs, mine = interleaved([composite, lambda: ours(x)])
    return baseline, theirs, mine


def main() -> None:
    title = (
        f"{K1} -> {K2} -> {K1}, gelu; {_native.selected_isa()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; median milliseconds"
    )
    table = Table("mode", "M", "F.linear in", "F.linear", "ffn_ops", "F.linear / ffn_ops", title=title)
    with torch.inference_mode():
        for mode, M in track([(mode, M) for mode in MODES for M in ROWS], "Measuring", transient=True):
            baseline, theirs, ours = measure(mode, M)
            table.add_row(mode, str(M), baseline, f"{theirs:.2f}", f"{ours:.2f}", f"{theirs / ours:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
