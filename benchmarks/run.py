# SPDX-License-Identifier: Apache-2.0
"""From the options to the results: plans the cells, starts a worker for each group of them, collects what
they say.

A worker holds one shape in one mode, so that weights are made and packed once. Peers with threads or faults
of their own get a worker for themselves, with ours beside them as an anchor. When a worker dies, the peer
that it was at has crashed; another worker goes on without it.
"""

import contextlib
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

from benchmarks import machine
from benchmarks.cases import COLD_ROWS, SEED, Mode, Shape
from benchmarks.peers import load

ROOT = Path(__file__).parents[1]
SILENCE_SECONDS = 1800  # a worker that says nothing for so long hangs
ANCHOR = "ours"
SCHEMA = 1


class Options(NamedTuple):
    shapes: list[Shape]
    modes: list[str]
    m: list[int]  # empty: those of the shapes
    threads: int
    isa: str | None
    peers: list[str]
    seconds: float  # for each peer in each cell


def cells(shape: Shape, m: list[int]) -> list[dict[str, Any]]:
    planned = []
    for M in m or shape.m:
        start = "cold" if COLD_ROWS[shape.kind] >= M else "warm"
        planned += [{"M": M, "start": start, "routing": routing} for routing in shape.routings or (None,)]
    first = shape.routings[0] if shape.routings else None
    return planned + [{"M": M, "start": "idle", "routing": first} for M in shape.idle_m if not m]


def run(options: Options, advance: Callable[[str, int], None]) -> dict[str, Any]:
    """All results; `advance` is told what is under way, and how many peers' cells are done."""
    absent = {name: load(name).available() for name in options.peers}
    here = [name for name, reason in absent.items() if reason is None]
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv[1:],
        "commit": machine.commit(ROOT),
        "emulated": emulated() is not None,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "settings": {
            "threads": options.threads,
            "isa": options.isa,
            "seed": SEED,
            "seconds": options.seconds,
        },
        "absent": {name: reason for name, reason in absent.items() if reason is not None},
        "skipped": [],
        "cells": [],
    }
    before = machine.probe(options.threads)
    for shape in options.shapes:
        for mode in options.modes:
            reason = too_large(shape, mode)
            if reason is not None:
                results["skipped"].append({"shape": shape.name, "mode": mode, "reason": reason})
                continue
            results["cells"] += measure_shape(shape, mode, options, here, advance)
    after = machine.probe(options.threads)
    drift = machine.drift(before, after)
    results["limits"] = {"before": before, "after": after, "drift": drift, "steady": drift <= machine.DRIFT}
    for cell in results["cells"]:
        set_limit(cell, before, results["machine"]["last_cache_bytes"])
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
    shape: Shape, mode: str, options: Options, here: list[str], advance: Callable[[str, int], None]
) -> list[dict[str, Any]]:
    planned = cells(shape, options.m)
    measured = [
        {"shape": shape.name, "kind": shape.kind, "mode": mode, "K1": shape.K1, "K2": shape.K2, "E": shape.E,
         "top_k": shape.top_k, "activation": shape.activation, **cell, "results": {}}
        for cell in planned
    ]  # fmt: skip
    groups: dict[str, list[str]] = {}
    for name in here:
        groups.setdefault(load(name).process, []).append(name)
    for process, peers in groups.items():
        advance(f"{shape.name}, {mode}", 0)
        anchored = process not in ("", "npu")
        job = {"shape": shape, "mode": mode, "cells": planned, "threads": options.threads,
               "seconds": options.seconds, "emulated": emulated() if process == "npu" else None}  # fmt: skip
        for index, line in enumerate(work(job, [ANCHOR, *peers] if anchored else peers, options.isa)):
            results = line["results"]
            if anchored:
                anchor = results.pop(ANCHOR, {}).get("seconds")
                for result in results.values():
                    result["anchor_seconds"] = anchor  # of ours, in the same process
            measured[index].update(line.get("facts", {}))
            measured[index]["results"].update(results)
            advance(f"{shape.name}, {mode}", len(results))
    return measured


def work(job: dict[str, Any], peers: list[str], isa: str | None) -> Iterator[dict[str, Any]]:
    """One line for each cell of the job, in order."""
    begin = 0
    crashed: dict[str, dict[str, Any]] = {}
    while begin < len(job["cells"]):
        left = [name for name in peers if name not in crashed]
        if not left:
            yield {"results": crashed}
            begin += 1
            continue
        with Worker({**job, "cells": job["cells"][begin:], "peers": left}, isa) as worker:
            for line in worker.lines():
                yield {**line, "results": {**line["results"], **crashed}}
                begin += 1
        if begin < len(job["cells"]):
            culprit = worker.culprit()
            result = {"status": "crashed", "reason": worker.last_words()}
            crashed |= {name: result for name in ([culprit] if culprit else left)}


class Worker:
    """worker.py in a process of its own, ended with the block."""

    def __init__(self, job: dict[str, Any], isa: str | None) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
        if isa is not None:
            environment["FFN_OPS_ISA"] = isa
        self._errors, self._diary = tempfile.TemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115
        self._job = json.dumps({**job, "diary": self._diary.name}).encode()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"], cwd=ROOT, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self._hung = False

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def lines(self) -> Iterator[dict[str, Any]]:
        """What the worker says, until it ends, or hangs and is ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with contextlib.suppress(BrokenPipeError):  # dead already: its exit code says more
            stdin.write(self._job)
            stdin.close()
        selector = selectors.DefaultSelector()
        selector.register(stdout, selectors.EVENT_READ)
        pending = b""
        while True:
            if not selector.select(SILENCE_SECONDS):
                self._hung = True
                return
            read = os.read(stdout.fileno(), 1 << 20)
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

    def last_words(self) -> str:
        """How it ended, and the last line that it printed."""
        code = self._process.returncode
        if self._hung:
            how = f"said nothing for {SILENCE_SECONDS} seconds"
        else:
            how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._errors.seek(0)
        printed = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{how}: {printed[-1]}" if printed else how


def set_limit(cell: dict[str, Any], limits: dict[str, float], last_cache: int) -> None:
    """The least time that the machine's limits allow for the cell, and each figure's share of it. Weights
    that start in a cache are not bound by memory."""
    if "operations" not in cell:
        return  # every worker of this cell died
    name, rate = machine.compute_limit(limits, Mode(cell["mode"]).row.x)
    times = {name: cell["operations"] / rate}
    if cell["start"] == "cold" or cell["bytes"] > last_cache:
        times["dram"] = cell["bytes"] / limits["dram"]
    cell["limit"] = max(times, key=lambda which: times[which])
    cell["limit_seconds"] = times[cell["limit"]]
    for result in cell["results"].values():
        if result.get("seconds") and result["device"] == "cpu":  # an NPU's limits are not known here
            result["of_limit"] = cell["limit_seconds"] / result["seconds"]
