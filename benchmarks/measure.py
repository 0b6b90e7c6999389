# SPDX-License-Identifier: Apache-2.0
"""Times of several calls taken in turn, so that the machine's moods meet all of them alike."""

import resource
import statistics
import time
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import torch

from benchmarks import machine
from benchmarks.cases import EVICTED

CLEAN = 5  # no figure from fewer samples than this
ENOUGH = 25
# Involuntary context switches of the process in a clean sample: one, or in a long sample one for so many
# seconds, since a timer's work on a busy core is one too.
MAX_SWITCHES, SWITCH_SECONDS = 1, 0.02
MAX_ROUNDS = 15  # when the time is over, and a busy machine leaves too few clean samples


def bound_by_memory(start: str, size: int) -> bool:
    """Whether a call that reads so many bytes of weights can be: not if a cache has them when it starts."""
    return start in EVICTED or size > machine.last_cache_bytes()


class Figure(NamedTuple):
    seconds: float | None  # the median; None: fewer than CLEAN clean samples
    quartiles: tuple[float, float] | None
    clean: int
    dropped: int
    samples: list[float | None]  # of every round; None: dropped


def ratio(one: Figure, other: Figure) -> float | None:
    """Of their times, round by round: its median moves less than those of the times when the machine does.
    Of these where fewer than CLEAN rounds have a sample of both, and None where one has no median."""
    pairs = zip(one.samples, other.samples, strict=True)
    ratios = [mine / its for mine, its in pairs if mine is not None and its is not None]
    if len(ratios) >= CLEAN:
        return statistics.median(ratios)
    return one.seconds / other.seconds if one.seconds and other.seconds else None


def evict_bytes() -> int:
    """Larger than the last cache, so that touching as much leaves nothing else in it."""
    return min(max(2 * machine.last_cache_bytes(), 64 << 20), 1 << 30)


class Start:
    """Brings the machine into the state in which a sample begins. `rest`: until idle threads have gone to
    sleep, where calls have threads of their own, which else meet those of the call before, still spinning."""

    def __init__(self, start: str, rest: bool = False) -> None:
        self.start, self.rest = start, rest
        # Ones, since untouched zeros are all the same page.
        self._buffer = torch.ones(evict_bytes() // 8, dtype=torch.int64) if start in EVICTED else None

    def __call__(self) -> None:
        if self._buffer is not None:
            # Read, as the weights of the layers before are. Had it been written, a sample would pay for
            # writing the cache back: half as long again for 75 MB of weights, with a cache of 32 MB.
            self._buffer.sum()
        if self.start == "idle" or self.rest:
            time.sleep(machine.IDLE_SECONDS)
        if self.start == "call":
            torch.npu.synchronize()


def switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def interleaved(
    calls: dict[str, Callable[[], object]],
    start: str,
    seconds: float,
    enter: Callable[[str], None] = lambda name: None,
    switches: Callable[[], int] = switches,
    rest: bool = False,
    memory: machine.Memory | None = None,
) -> tuple[dict[str, Figure], float | None]:
    """One sample of each call in every round, until each has ENOUGH clean ones or the time is over: `seconds`
    for each call, and no fewer rounds than CLEAN samples take. `enter` is told which call comes next. Also
    what `memory` gave, the median of a reading in every round: on a shared machine it may be half as much a
    second later.

    Every other round goes backwards, but ends with the same call, so that none follows itself. What one call
    leaves behind (memory to free, say) would else always meet the same other one, and leave that one no clean
    samples.
    """
    names = list(calls)
    orders = names, names[-2::-1] + names[-1:]
    prepare = Start(start, rest)
    taken: dict[str, list[float | None]] = {name: [] for name in calls}
    rates: list[float] = []
    end = time.perf_counter() + seconds * len(calls)
    for round in count():
        fewest = min((round - times.count(None) for times in taken.values()), default=ENOUGH)
        over = time.perf_counter() > end
        if fewest >= ENOUGH or (over and (fewest >= CLEAN or round >= MAX_ROUNDS)):
            break
        if memory is not None:
            rates.append(memory.rate())
        for name in orders[round % 2]:
            enter(name)
            prepare()
            before, begin = switches(), time.perf_counter()
            calls[name]()
            elapsed = time.perf_counter() - begin
            clean = switches() - before <= max(MAX_SWITCHES, elapsed / SWITCH_SECONDS)
            taken[name].append(elapsed if clean else None)
    figures = {name: summarize(samples) for name, samples in taken.items()}
    return figures, statistics.median(rates) if rates else None


def summarize(samples: list[float | None]) -> Figure:
    times = [sample for sample in samples if sample is not None]
    dropped = len(samples) - len(times)
    if len(times) < CLEAN:
        return Figure(None, None, len(times), dropped, samples)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Figure(median, (low, high), len(times), dropped, samples)
