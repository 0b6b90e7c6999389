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
from benchmarks.cases import SHAPES, Mode, read_shapes
from benchmarks.peers import known, load
from benchmarks.run import ROOT, Options, run

FILES = ("cells", "encoder", "switch")  # what ours is held to
QUICK_MODES = "float32,bf16,w8a8_bf16,w8a16_bf16"
QUICK_M = {"MiniLM-L6": (1, 32), "Switch-base-8": (1, 64)}
SECONDS, QUICK_SECONDS = 1.0, 0.2
MINUTES, QUICK_MINUTES = 60.0, 2.7

Paths = list[Path]


def main(
    shapes: Annotated[Paths | None, typer.Option(help="shape files, or names in benchmarks/shapes")] = None,
    modes: Annotated[
        str, typer.Option(help="the contract's, by commas, :128 for groups; those of the shape files")
    ] = "",
    m: Annotated[str, typer.Option(help="rows, by commas; those of the shape files")] = "",
    threads: Annotated[int, typer.Option(help="of each peer")] = len(os.sched_getaffinity(0)),
    isa: Annotated[str | None, typer.Option(help="forces FFN_OPS_ISA on ours")] = None,
    peers: Annotated[str, typer.Option(help="names by commas, or module:Class; all that are known")] = "",
    minutes: Annotated[float | None, typer.Option(help="what is not reached by then is skipped")] = None,
    out: Annotated[Path | None, typer.Option(help="results file; plots are written beside it")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="two shapes, few modes, and torch's own operators")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="OLD.json NEW.json: what became slower")
    ] = None,
    publish: Annotated[
        Paths | None, typer.Option(help="writes docs/benchmarks.md from this results file; may be repeated")
    ] = None,
) -> None:
    """Measure ours beside every peer that is installed; or compare two results files, or publish one."""
    if compare is not None:
        slower = report.compare(*(json.loads(file.read_text()) for file in compare))
        for sentence in slower:
            typer.echo(sentence)
        typer.echo(f"{len(slower)} figures became slower.")
        raise typer.Exit(bool(slower))
    if publish:
        for path in report.publish(publish, ROOT / "docs" / "benchmarks.md"):
            typer.echo(path)
        return
    try:
        options = plan(shapes, modes, m, threads, isa, peers, minutes, quick)
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
    shapes: Paths | None,
    modes: str,
    m: str,
    threads: int,
    isa: str | None,
    peers: str,
    minutes: float | None,
    quick: bool,
) -> Options:
    if quick and not shapes:
        chosen = [shape._replace(m=QUICK_M[shape.name], skew_m=(), modes=())
                  for file in SHAPES.glob("*.toml") for shape in read_shapes(file)
                  if shape.name in QUICK_M]  # fmt: skip
    else:
        files = [file if file.suffix else SHAPES / f"{file}.toml" for file in shapes or map(Path, FILES)]
        chosen = [shape for file in files for shape in read_shapes(file)]
    wanted = (modes or (QUICK_MODES if quick else "")).split(",")
    wanted = [mode for mode in wanted if mode]
    for mode in wanted:
        Mode(mode)
    names = peers.split(",") if peers else [name for name, peer in known().items() if not quick or peer.quick]
    for name in names:
        load(name)
    rows = [int(rows) for rows in m.split(",") if rows]
    seconds, most = (QUICK_SECONDS, QUICK_MINUTES) if quick else (SECONDS, MINUTES)
    return Options(chosen, wanted, rows, threads, isa, names, seconds, minutes or most)


def measure(options: Options, out: Path) -> tuple[report.Results, list[Path]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("limits of the machine", total=None)
        results = run(
            options,
            lambda total: progress.update(task, total=total),
            lambda what, done: progress.update(task, description=what, advance=done),
        )
    return results, report.write(results, out)


if __name__ == "__main__":
    typer.run(main)
