# SPDX-License-Identifier: Apache-2.0
"""Peers that misbehave, for test_benchmarks.py: `--peers tests.bench_peers:Wrong` and the like."""

import os

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers import Call, Eager


class Wrong(Eager):
    name = "tests.bench_peers:Wrong"

    def make(self, case: Case) -> Call:
        right = super().make(case)
        return lambda: right() * 1.5


class CrashesAtOnce(Eager):
    name = "tests.bench_peers:CrashesAtOnce"

    def make(self, case: Case) -> Call:
        os.abort()


class CrashesLater(Eager):
    """While it is timed."""

    name = "tests.bench_peers:CrashesLater"

    def make(self, case: Case) -> Call:
        right, calls = super().make(case), iter(range(4))

        def call() -> Tensor:
            if next(calls) == 3:
                os.abort()
            return right()

        return call


class Alone(Eager):
    name = "tests.bench_peers:Alone"
    process = "alone"


class Absent(Eager):
    name = "tests.bench_peers:Absent"

    def available(self) -> str | None:
        return "needs a machine that nobody has"
