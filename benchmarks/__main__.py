# SPDX-License-Identifier: Apache-2.0
"""The command line: python -m benchmarks --help."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

try:
    import matplotlib as _  # noqa: F401
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as error:
    sys.exit(
        f"the benchmark needs {error.name}, which this Python does not have (pip install 'ffn-ops[bench]')"
    )

from benchmarks import report
from benchmarks.cases import SHAPES, Mode, Shape, read_shapes
from benchmarks.peers import known, load
from benchmarks.run import ROOT, Options, cells, run

MODES = "float32,bf16,fp16,w8a8,w8a8_bf16,w8a16_bf16,w8a16_bf16:128,w4a16_bf16:32,w4a16_bf16:128,w4a16:128"
QUICK_MODES = "float32,bf16,w8a8_bf16,w8a16_bf16"
QUICK_SHAPES = ("MiniLM-L6", "Switch-base-8")
QUICK_M = 64
SECONDS, QUICK_SECONDS = 2.0, 0.2

Paths = list[Path]


def main(
    shapes: Annotated[
        Paths | None, typer.Option(help="shape files, or names in benchmarks/shapes; all of them")
    ] = None,
    modes: Annotated[str, typer.Option(help="the contract's, by commas; :128 for groups")] = MODES,
    m: Annotated[str, typer.Option(help="rows, by commas; those of the shape files")] = "",
    threads: Annotated[int, typer.Option(help="of each peer")] = len(os.sched_getaffinity(0)),
    isa: Annotated[str | None, typer.Option(help="forces FFN_OPS_ISA on ours")] = None,
    peers: Annotated[str, typer.Option(help="names by commas, or module:Class; all that are known")] = "",
    out: Annotated[Path | None, typer.Option(help="results file; plots are written beside it")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="two shapes, few modes, and torch's own operators")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="OLD.json NEW.json: what became slower")
    ] = None,
    publish: Annotated[
        Path | None, typer.Option(help="writes docs/benchmarks.md from this results file")
    ] = None,
) -> None:
    """Measure ours beside every peer that is installed; or compare two results files, or publish one."""
    if compare is not None:
        slower = report.compare(*(json.loads(file.read_text()) for file in compare))
        for sentence in slower:
            typer.echo(sentence)
        typer.echo(f"{len(slower)} figures became slower.")
        raise typer.Exit(bool(slower))
    if publish is not None:
        for path in report.publish(publish, ROOT / "docs" / "benchmarks.md"):
            typer.echo(path)
        return
    try:
        options = plan(shapes, modes, m, threads, isa, peers, quick)
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from None
    results, files = measure(options, out or Path(f"bench-{time.strftime('%Y%m%d-%H%M%S')}.json"))
    console = Console()
    table = report.table(results)
    whole = console.measure(table, options=console.options.update(max_width=1000)).maximum
    Console(width=max(console.width, whole)).print(table)
    for sentence in report.summary(results):
        console.print(sentence, highlight=False, markup=False)
    console.print("Written: " + ", ".join(str(file) for file in files), highlight=False)


def plan(
    shapes: Paths | None, modes: str, m: str, threads: int, isa: str | None, peers: str, quick: bool
) -> Options:
    files = [
        file if file.suffix else SHAPES / f"{file}.toml" for file in shapes or sorted(SHAPES.glob("*.toml"))
    ]
    chosen = [shape for file in files for shape in read_shapes(file)]
    if quick and not shapes:
        chosen = [_quick(shape) for shape in chosen if shape.name in QUICK_SHAPES]
    elif not shapes:
        chosen = [shape for shape in chosen if shape.model != "none"]
    wanted = (QUICK_MODES if quick and modes == MODES else modes).split(",")
    for mode in wanted:
        Mode(mode)
    names = peers.split(",") if peers else [name for name, peer in known().items() if not quick or peer.quick]
    for name in names:
        load(name)
    rows = [int(rows) for rows in m.split(",") if rows]
    return Options(chosen, wanted, rows, threads, isa, names, QUICK_SECONDS if quick else SECONDS)


def _quick(shape: Shape) -> Shape:
    return shape._replace(m=tuple(M for M in shape.m if M <= QUICK_M), routings=shape.routings[:1])


def measure(options: Options, out: Path) -> tuple[report.Results, list[Path]]:
    total = (
        sum(len(cells(shape, options.m)) for shape in options.shapes)
        * len(options.modes)
        * len(options.peers)
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("limits of the machine", total=total)
        results = run(options, lambda what, done: progress.update(task, description=what, advance=done))
    return results, report.write(results, out)


if __name__ == "__main__":
    typer.run(main)
