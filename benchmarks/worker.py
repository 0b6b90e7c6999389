# SPDX-License-Identifier: Apache-2.0
"""The process that measures the cells of one shape in one mode. run.py starts it, and outlives it.

It reads a job in JSON from its standard input and writes a line of JSON for each cell. Before it enters a
peer's code it writes that peer's name into the job's diary, a file, so that its parent knows where it was
when it died: a line on the pipe would wake the parent in the middle of a sample.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks import encoder, machine, measure
from benchmarks.cases import EVICTED, Case, Shape, Weights
from benchmarks.check import Answer, Verdict
from benchmarks.peers import OURS_NAMES, Call, Peer, load

DIARY_BYTES = 100
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# A peer that is so much slower than another, a call, is not measured: five samples of it would take too long.
SLOW, SLOW_SECONDS = 10, 0.5


class Ready(NamedTuple):
    """A peer that has given a right answer."""

    call: Call
    verdict: Verdict
    make_seconds: float
    call_seconds: float  # of the second call


def main() -> None:
    # Not to outlive the parent, whatever ends that.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Libraries print on standard output: from here on that is the parent's error stream.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    peers = [load(name) for name in job["peers"]]
    shape = Shape(*(tuple(value) if isinstance(value, list) else value for value in job["shape"]))
    if job["emulated"] is not None:
        from ffn_ops.emulator import enable

        enable(*job["emulated"])
    diary = os.open(job["diary"], os.O_WRONLY)

    def enter(name: str) -> None:
        os.pwrite(diary, name.encode().ljust(DIARY_BYTES), 0)

    with torch.inference_mode(), machine.Memory(job["threads"]) as memory:
        whole = shape.kind == "encoder"
        weights: Any = (encoder.Models if whole else Weights)(shape, job["mode"])
        slow: dict[str, int] = {}  # rows with which a peer was too slow: with more it would take minutes
        for cell in job["cells"]:
            start = cell["start"]
            if whole:
                case: Any = encoder.Case(weights, cell["M"], start, cell["part"])
                answer: Any = encoder.Answer(case)
            else:
                case = Case(weights, cell["M"], start, cell["routing"])
                answer = Answer(case)
            facts = case.facts | {"evicted_bytes": measure.evict_bytes() if start in EVICTED else 0}
            bound = measure.bound_by_memory(start, facts.get("bytes", 0))
            able = [peer for peer in peers if slow.get(peer.name, cell["M"]) >= cell["M"]]
            results, rate = measure_cell(case, answer, able, job["seconds"], job["rest"], enter,
                                         memory if bound else None)  # fmt: skip
            for peer in peers:
                if peer not in able:
                    reason = f"too slow with {slow[peer.name]} rows already"
                    results[peer.name] = {"status": "slow", "reason": reason}
                elif results[peer.name]["status"] == "slow":
                    slow[peer.name] = min(cell["M"], slow.get(peer.name, cell["M"]))
            if rate is not None:
                facts["dram"] = rate
            lines.write(json.dumps({"facts": facts, "results": results}) + "\n")


def seconds_of(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure_cell(
    case: Any,
    answer: Any,
    peers: list[Peer],
    seconds: float,
    rest: bool,
    enter: Callable[[str], None],
    memory: machine.Memory | None,
) -> tuple[dict[str, dict[str, Any]], float | None]:
    """By peer: its figure, or why it has none; and the rate of memory. `rest` as for measure.Start; `enter`
    is told whose code is about to run; `memory` as for measure.interleaved."""
    results: dict[str, dict[str, Any]] = {}
    ready: dict[str, Ready] = {}
    for peer in peers:
        enter(peer.name)
        refusal = peer.refuses(case)
        if refusal is not None:
            results[peer.name] = {"status": "unfit", "reason": refusal}
            continue
        size, free = case.shape.weight_bytes(case.mode_name), machine.free_bytes()
        if 1.5 * size > free:  # its copy of the weights, and what it needs to make that
            reason = f"a copy of {size / 1e9:.1f} GB of weights leaves too little of {free / 1e9:.1f} GB free"
            results[peer.name] = {"status": "skipped", "reason": reason}
            continue
        try:
            begin = time.perf_counter()
            call = peer.make(case)
            made = case.weights.pack_seconds.get(peer.name, time.perf_counter() - begin)
            verdict = answer.judge(call(), peer.quantizes_rows)
        except Exception as error:  # a peer's own words, whatever they are
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            results[peer.name] = {"status": "refused", "reason": reason}
            continue
        if verdict.reason is not None:
            results[peer.name] = {"status": "wrong", "reason": verdict.reason, "error": verdict.error}
            continue
        # The first call was the checked one; this is the warm-up.
        ready[peer.name] = Ready(call, verdict, made if peer.packs else 0.0, seconds_of(call))
    fastest = min((one.call_seconds for one in ready.values()), default=0.0)
    for name, one in list(ready.items()):
        most = max(SLOW * fastest, SLOW_SECONDS)
        if one.call_seconds > most and seconds_of(one.call) > most:
            reason = f"more than {SLOW} times as slow as the fastest, and more than {SLOW_SECONDS} s a call"
            results[name] = {"status": "slow", "reason": reason, "error": one.verdict.error,
                             "call_seconds": one.call_seconds}  # fmt: skip
            del ready[name]
    calls = {name: one.call for name, one in ready.items()}
    figures, rate = measure.interleaved(calls, case.start, seconds, enter, rest=rest, memory=memory)
    by_name = {peer.name: peer for peer in peers}
    ours = [figure for name, figure in figures.items() if name in OURS_NAMES and figure.seconds]
    base = min(ours, key=lambda figure: figure.seconds or 0.0, default=None)
    for name, one in ready.items():
        figure, peer = figures[name], by_name[name]
        packed = peer.weight1(case)
        # Its middle: the first pages may be small ones.
        inside = None if packed is None else packed.data_ptr() + packed.nbytes // 2
        result: dict[str, Any] = {
            "status": "timed" if figure.seconds is not None else "noisy",
            "device": peer.device,
            "seconds": figure.seconds,
            "quartiles": figure.quartiles,
            "clean": figure.clean,
            "dropped": figure.dropped,
            "error": one.verdict.error,
            "bound_share": one.verdict.share,
            "pack_seconds": one.make_seconds or None,
            "huge_share": None if inside is None else machine.huge_share(inside),
            "other_numerics": peer.other_numerics,
            "over_ours": base and measure.ratio(figure, base),
        }
        if figure.seconds is None:
            result["reason"] = f"fewer than {measure.CLEAN} samples without context switches"
        results[name] = result
    return results, rate


if __name__ == "__main__":
    main()
