# SPDX-License-Identifier: Apache-2.0
"""From the options to the results: plans the cells, starts a worker for each group of them, collects what
they say.

A worker holds one shape in one mode, so that weights are made and packed once. Peers with threads or faults
of their own get a worker for themselves, with ours beside them as an anchor. When a worker dies, the peer
that it was at has crashed; another worker goes on without it.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import encoder, machine
from benchmarks.cases import COLD_ROWS, EVICTED_BY, SEED, SKEWED, UNIFORM, Mode, Shape
from benchmarks.peers import load

ROOT = Path(__file__).parents[1]
SILENCE_SECONDS = 600  # a worker that says nothing for so long hangs
CLOSING_SECONDS = 10  # of the allowed time are for the last probe, the table and the plots
ANCHOR = "ours packed"
DEFAULT_MODES = (
    "float32", "bf16", "fp16", "w8a8_bf16", "w8a16_bf16", "w8a16", "w4a16_bf16:32", "w4a16_bf16:128",
    "w4a16:128",
)  # fmt: skip
SCHEMA = 1


Advance = Callable[[str, int], None]  # what is under way, and how many more cells of peers are done


class Options(NamedTuple):
    shapes: list[Shape]
    modes: list[str]  # empty: those of the shapes, or DEFAULT_MODES
    m: list[int]  # empty: those of the shapes
    threads: int
    isa: str | None
    peers: list[str]
    seconds: float  # for each peer in each cell
    minutes: float  # for all of it: what is not reached by then is skipped


def cells(shape: Shape, m: list[int]) -> list[dict[str, Any]]:
    """What is to be measured of a shape in a mode."""
    if shape.kind == "encoder":
        return [{"M": M, "start": "warm", "routing": None, "part": part}
                for M in m or shape.m for part in encoder.PARTS]  # fmt: skip
    usual = UNIFORM if shape.E else None
    planned = [(M, "cold" if COLD_ROWS[shape.kind] >= M else "warm", usual) for M in m or shape.m]
    planned += [(M, start, skewed) for M, start, _ in planned if M in shape.skew_m for skewed in SKEWED]
    planned += [(M, "idle", usual) for M in shape.idle_m if not m]
    return [{"M": M, "start": start, "routing": routing} for M, start, routing in planned]


def run(options: Options, start: Callable[[int], None], advance: Advance) -> dict[str, Any]:
    """All results. `start` is told how many cells of peers there are."""
    end = time.monotonic() + 60 * options.minutes - CLOSING_SECONDS
    absent = {name: load(name).available() for name in options.peers}
    here = [name for name, reason in absent.items() if reason is None]
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv[1:],
        "commit": machine.commit(ROOT),
        "evicted_by": EVICTED_BY,
        "emulated": emulated() is not None,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "settings": {
            "threads": options.threads,
            "isa": options.isa,
            "seed": SEED,
            "seconds": options.seconds,
            "minutes": options.minutes,
        },
        "absent": {name: reason for name, reason in absent.items() if reason is not None},
        "skipped": [],
        "cells": [],
    }
    jobs = []
    for shape in options.shapes:
        peers = [name for name in here if shape.kind in load(name).kinds]
        for mode in options.modes or shape.modes or DEFAULT_MODES:
            reason = too_large(shape, mode)
            if reason is None:
                jobs.append((shape, mode, peers))
            else:
                results["skipped"].append({"shape": shape.name, "mode": mode, "reason": reason})
    start(sum(len(cells(shape, options.m)) * len(peers) for shape, _, peers in jobs))
    before = machine.probe(options.threads)
    for shape, mode, peers in jobs:
        results["cells"] += measure_shape(shape, mode, options, peers, end, advance)
    after = machine.probe(options.threads)
    drift = max(machine.drift(before, after).values())
    results["limits"] = {"before": before, "after": after, "drift": drift, "steady": drift <= machine.DRIFT}
    best = {name: max(before[name], after[name]) for name in before}  # a limit is what nothing disturbed
    for cell in results["cells"]:
        set_limit(cell, best)
    return results


def emulated() -> tuple[str, int, bool] | None:
    """What this process's emulator was enabled with; its workers must be like it."""
    return getattr(sys.modules.get("ffn_ops.emulator"), "enabled", None)


def too_large(shape: Shape, mode: str) -> str | None:
    size, free = shape.weight_bytes(mode), machine.free_bytes()
    if size <= free / 2:
        return None
    return f"weights of {size / 1e9:.1f} GB are more than half of the {free / 1e9:.1f} GB of free memory"


def measure_shape(
    shape: Shape, mode: str, options: Options, peers: list[str], end: float, advance: Advance
) -> list[dict[str, Any]]:
    planned = cells(shape, options.m)
    if any(load(name).process == "npu" for name in peers):
        planned.append({"M": planned[0]["M"], "start": "call", "routing": None})
    measured = [
        {"shape": shape.name, "kind": shape.kind, "mode": mode, "K1": shape.K1, "K2": shape.K2, "E": shape.E,
         "top_k": shape.top_k, "activation": shape.activation, **cell, **bar(shape, mode, cell),
         "results": {}}
        for cell in planned
    ]  # fmt: skip
    groups: dict[str, list[str]] = {}
    for name in peers:
        groups.setdefault(load(name).process, []).append(name)
    for process, members in groups.items():
        advance(f"{shape.name}, {mode}", 0)
        anchored = process not in ("", "npu")
        mine = [cell for cell in planned if process == "npu" or cell["start"] != "call"]
        job = {"shape": shape, "mode": mode, "cells": mine, "threads": options.threads,
               "seconds": options.seconds, "rest": anchored,
               "emulated": emulated() if process == "npu" else None}  # fmt: skip
        lines = work(job, [ANCHOR, *members] if anchored else members, options.isa, end)
        for index, line in enumerate(lines):
            results = line["results"]
            if anchored:
                results.pop(ANCHOR, None)
            # Memory's rate is that of the first that measured it.
            measured[index] = line.get("facts", {}) | measured[index]
            measured[index]["results"].update(results)
            advance(f"{shape.name}, {mode}", len(results))
    return measured


def work(job: dict[str, Any], peers: list[str], isa: str | None, end: float) -> Iterator[dict[str, Any]]:
    """One line for each cell of the job, in order."""
    begin = 0
    lost: dict[str, dict[str, Any]] = {}  # peers that take no further part
    while begin < len(job["cells"]):
        left = [name for name in peers if name not in lost]
        if not left:
            yield {"results": lost}
            begin += 1
            continue
        with Worker({**job, "cells": job["cells"][begin:], "peers": left}, isa, end) as worker:
            for line in worker.lines():
                yield {**line, "results": {**line["results"], **lost}}
                begin += 1
            if begin < len(job["cells"]):
                culprit, result = worker.culprit(), worker.last_words()
                only_one = culprit and result["status"] == "crashed"
                lost |= dict.fromkeys([culprit] if only_one else left, result)


class Worker:
    """worker.py in a process of its own, ended with the block."""

    def __init__(self, job: dict[str, Any], isa: str | None, end: float) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
        if isa is not None:
            environment["FFN_OPS_ISA"] = isa
        self._errors, self._diary = tempfile.TemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115
        self._job = tempfile.TemporaryFile()  # noqa: SIM115
        self._job.write(json.dumps({**job, "diary": self._diary.name}).encode())
        self._job.seek(0)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"], cwd=ROOT, env=environment,
            stdin=self._job, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        assert self._process.stdout is not None
        self._stdout = self._process.stdout
        self._end = end
        self._ended: dict[str, Any] | None = None  # why we ended it

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._stdout, self._job, self._errors, self._diary):
            file.close()

    def lines(self) -> Iterator[dict[str, Any]]:
        """What the worker says, until it ends, or hangs and is ended."""
        selector = selectors.DefaultSelector()
        selector.register(self._stdout, selectors.EVENT_READ)
        pending = b""
        while True:
            left = self._end - time.monotonic()
            if not selector.select(max(0, min(SILENCE_SECONDS, left))):
                hung = {"status": "crashed", "reason": f"said nothing for {SILENCE_SECONDS} seconds"}
                late = {"status": "skipped", "reason": "the time was over"}
                self._ended = hung if left > SILENCE_SECONDS else late
                self._process.kill()
            read = os.read(self._stdout.fileno(), 1 << 20)
            if not read:
                self._process.wait()
                return
            *whole, pending = (pending + read).split(b"\n")
            for line in whole:
                yield json.loads(line)

    def culprit(self) -> str:
        """The peer whose code it ran last; "" before the first."""
        self._diary.seek(0)
        return self._diary.read().decode().strip()

    def last_words(self) -> dict[str, Any]:
        """As a result: how it ended, and the last line that it printed."""
        if self._ended is not None:
            return self._ended
        code = self._process.returncode
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._errors.seek(0)
        printed = self._errors.read().decode(errors="replace").strip().splitlines()
        return {"status": "crashed", "reason": f"{how}: {printed[-1]}" if printed else how}


def bar(shape: Shape, mode: str, cell: dict[str, Any]) -> dict[str, Any]:
    """What ours must reach: nowhere may it lose."""
    usual = cell["start"] in ("cold", "warm") and cell["routing"] in (None, UNIFORM)
    found = [bar for bar in shape.bars if usual and mode in bar.modes and cell["M"] in bar.m]
    return {"bar": found[0].ratio, "bar_of": found[0].of} if found else {"bar": 1.0, "bar_of": "peer"}


def set_limit(cell: dict[str, Any], limits: dict[str, float]) -> None:
    """The least time that the machine's limits allow for the cell, and each figure's share of it. Memory's is
    what it gave in turn with the samples, for weights that do not start in a cache."""
    if "operations" not in cell:
        return  # every worker of this cell died
    name, rate = machine.compute_limit(limits, Mode(cell["mode"]).row.x)
    times = {name: cell["operations"] / rate}
    if "dram" in cell:
        times["dram"] = cell["bytes"] / cell["dram"]
    cell["limit"] = max(times, key=lambda which: times[which])
    cell["limit_seconds"] = times[cell["limit"]]
    for result in cell["results"].values():
        if result.get("seconds") and result["device"] == "cpu":  # an NPU's limits are not known here
            result["of_limit"] = cell["limit_seconds"] / result["seconds"]
