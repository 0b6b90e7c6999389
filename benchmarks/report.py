# SPDX-License-Identifier: Apache-2.0
"""What is shown of a results file: the table, the plots, what became slower, and docs/benchmarks.md."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

Results = dict[str, Any]
OURS = {"cpu": ("ours packed", "ours"), "npu": ("ours on NPU",)}
OURS_NAMES = {name for names in OURS.values() for name in names}
# A figure has become slower when it is beyond the old one by more than this and by more than both spreads.
SLOWER = 0.1
EMULATED = "Measured on the emulator: these times say nothing about an NPU."


def cell_name(cell: dict[str, Any]) -> str:
    routing = f", {cell['routing']}" if cell["routing"] else ""
    return f"{cell['shape']}, {cell['mode']}, M = {cell['M']}, {cell['start']}{routing}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-2 else f"{seconds * 1e3:.1f} ms"


def our_seconds(cell: dict[str, Any], device: str = "cpu") -> float | None:
    """The better of ours."""
    times = [cell["results"].get(name, {}).get("seconds") for name in OURS[device]]
    return min((time for time in times if time), default=None)


def warnings(results: Results) -> list[str]:
    found = []
    if results.get("emulated"):
        found.append(EMULATED)
    if not results["limits"]["steady"]:
        found.append(
            f"The machine's limits moved by {results['limits']['drift']:.0%} while this ran: "
            "no figure is to be trusted."
        )
    return found


HEADINGS = ("cell", "peer", "median", "quartiles", "ours is", "of limit", "error", "samples")


def rows(results: Results) -> Iterator[tuple[str, ...]]:
    """One for each peer of each cell, without those that refused because they are for something else."""
    for cell in results["cells"]:
        first = True
        for name, result in cell["results"].items():
            if result["status"] == "refused" and name not in OURS["cpu"]:
                continue
            head = cell_name(cell) if first else ""
            first = False
            if result["status"] != "timed":
                yield head, name, result["status"], *[""] * (len(HEADINGS) - 3)
                continue
            mine = result.get("anchor_seconds") or our_seconds(cell, result["device"])
            ratio = "" if name in OURS_NAMES or mine is None else f"{result['seconds'] / mine:.2f}x"
            low, high = result["quartiles"]
            limit = f"{result['of_limit']:.0%} {cell['limit']}" if "of_limit" in result else ""
            samples = f"{result['clean']}" + (f" ({result['dropped']} dropped)" if result["dropped"] else "")
            spread = f"{duration(low)} - {duration(high)}"
            error = f"{result['error']:.1e}"
            yield head, name, duration(result["seconds"]), spread, ratio, limit, error, samples


def reasons(results: Results) -> list[str]:
    """Why peers have no figure where they should."""
    cells: dict[tuple[str, str, str], int] = {}
    for cell in results["cells"]:
        for name, result in cell["results"].items():
            if result["status"] != "timed" and (result["status"] != "refused" or name in OURS["cpu"]):
                key = (name, result["status"], result["reason"])
                cells[key] = cells.get(key, 0) + 1
    return [f"{name}, {status} in {_cells(count)}: {why}." for (name, status, why), count in cells.items()]


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"


def summary(results: Results) -> list[str]:
    """Sentences about the run as a whole."""
    machine, limits = results["machine"], results["limits"]
    rates = ", ".join(f"{name} {rate / 1e9:.1f} {'GB/s' if name == 'dram' else 'GFLOP/s'}"
                      for name, rate in limits["before"].items())  # fmt: skip
    lines = [
        f"{machine['cpu']} ({machine['cpu_id']}), {results['settings']['threads']} threads, commit "
        f"{results['commit']}, torch {results['versions']['torch']}; limits: {rates}; "
        f"drift {limits['drift']:.0%}."
    ]
    lines += reasons(results)
    lines += [f"{skip['shape']}, {skip['mode']}: skipped, {skip['reason']}." for skip in results["skipped"]]
    if results["absent"]:
        lines.append(
            "Absent: " + "; ".join(f"{name} ({why})" for name, why in results["absent"].items()) + "."
        )
    return lines + warnings(results)


def table(results: Results) -> Table:
    shown = Table()
    for heading in HEADINGS:
        shown.add_column(heading, no_wrap=True)
    for row in rows(results):
        if row[0]:
            shown.add_section()
        shown.add_row(*row)
    return shown


def compare(old: Results, new: Results) -> list[str]:
    """A sentence for each figure that has become slower."""
    before = {
        (cell_name(cell), name): result for cell in old["cells"] for name, result in cell["results"].items()
    }
    slower = []
    for cell in new["cells"]:
        for name, result in cell["results"].items():
            was = before.get((cell_name(cell), name), {})
            if was.get("status") != "timed":
                continue
            if result["status"] != "timed":
                slower.append(
                    f"{cell_name(cell)}: {name} was timed, and now is {result['status']}: {result['reason']}"
                )
                continue
            ratio = result["seconds"] / was["seconds"]
            if ratio > 1 + SLOWER and result["quartiles"][0] > was["quartiles"][1]:
                took = duration(result["seconds"])
                slower.append(f"{cell_name(cell)}: {name} takes {took}, {ratio:.2f} times as long as before")
    return slower


def write(results: Results, out: Path) -> list[Path]:
    """out, a JSON file, and plots beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    return [out, *plots(results, out.with_suffix(""))]


def plots(results: Results, stem: Path) -> list[Path]:
    """PNG files whose names begin with `stem`; what the results have nothing for is left out."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = [_speed_up(results), _roofline(results), _packing(results), _skew(results)]
    paths = []
    for name, figure in (pair for pair in drawn if pair is not None):
        path = stem.with_name(f"{stem.name}-{name}.png")
        figure.savefig(path, dpi=120, bbox_inches="tight")
        paths.append(path)
    import matplotlib.pyplot

    matplotlib.pyplot.close("all")
    return paths


def _timed(cell: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: result for name, result in cell["results"].items() if result["status"] == "timed"}


def _grid(count: int) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    columns = min(count, 3)
    figure, axes = plt.subplots(
        math.ceil(count / columns),
        columns,
        figsize=(5 * columns, 3.6 * math.ceil(count / columns)),
        squeeze=False,
    )
    axes = list(axes.flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes


def _speed_up(results: Results) -> tuple[str, Any] | None:
    """Each peer's time over ours, by M: one panel for each shape and mode."""
    panels: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for cell in results["cells"]:
        if cell["start"] == "idle" or cell["routing"] not in (None, "uniform"):
            continue
        for name, result in _timed(cell).items():
            mine = result.get("anchor_seconds") or our_seconds(cell, result["device"])
            if name not in OURS_NAMES and mine:
                panel = panels.setdefault((cell["shape"], cell["mode"]), {})
                panel.setdefault(name, []).append((cell["M"], result["seconds"] / mine))
    if not panels:
        return None
    figure, axes = _grid(len(panels))
    for axis, ((shape, mode), peers) in zip(axes, panels.items(), strict=False):
        for name, points in peers.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"{shape}, {mode}", xlabel="M", ylabel="its time / ours", xscale="log", yscale="log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    return "speed-up", figure


def _roofline(results: Results) -> tuple[str, Any] | None:
    """Every cell of ours: operations per byte, and operations per second, below what the machine could do."""
    import matplotlib.pyplot as plt

    limits = results["limits"]["before"]
    points: dict[str, list[tuple[float, float]]] = {}
    for cell in results["cells"]:
        mine = our_seconds(cell)
        if mine:
            at = (cell["operations"] / cell["bytes"], cell["operations"] / mine / 1e9)
            points.setdefault(f"{cell['mode']}, {cell['start']}", []).append(at)
    if not points or "dram" not in limits:
        return None
    figure, axis = plt.subplots(figsize=(8, 5.5))
    for name, at in points.items():
        axis.scatter(*zip(*at, strict=True), s=18, label=name)
    low, high = (pick(x for at in points.values() for x, _ in at) for pick in (min, max))
    steps = [low / 2 * (high * 4 / low) ** (i / 100) for i in range(101)]
    for name, rate in limits.items():
        if name != "dram":
            axis.plot(steps, [min(rate, x * limits["dram"]) / 1e9 for x in steps], label=f"limit: {name}")
    axis.set(xlabel="operations per byte of memory traffic", ylabel="10⁹ operations per second", xscale="log",
             yscale="log", title="ours; warm cells may lie above the memory's slope")  # fmt: skip
    axis.legend(fontsize=7)
    return "roofline", figure


def _packing(results: Results) -> tuple[str, Any] | None:
    """How long packing takes, in calls of the smallest M: after how many calls it has paid for itself."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for cell in results["cells"]:
        for name, result in _timed(cell).items():
            if result.get("pack_seconds"):
                times.setdefault((cell["shape"], cell["mode"]), {}).setdefault(name, result["pack_seconds"])
    if not times:
        return None
    figure, axes = _grid(1)
    names = sorted({name for one in times.values() for name in one})
    for i, name in enumerate(names):
        places = [row + i / (len(names) + 1) for row in range(len(times))]
        axes[0].barh(
            places, [one.get(name, 0) * 1e3 for one in times.values()], 1 / (len(names) + 1), label=name
        )
    axes[0].set_yticks(range(len(times)), [", ".join(key) for key in times], fontsize=7)
    axes[0].set(xlabel="milliseconds to pack both weights", xscale="log")
    axes[0].legend(fontsize=7)
    return "packing", figure


def _skew(results: Results) -> tuple[str, Any] | None:
    """Ours by routing, relative to the uniform one."""
    panels: dict[str, dict[str, float]] = {}
    for cell in results["cells"]:
        mine = our_seconds(cell)
        if mine and cell["routing"] and cell["start"] != "idle":
            panels.setdefault(f"{cell['shape']}, {cell['mode']}, M = {cell['M']}", {})[cell["routing"]] = mine
    panels = {name: one for name, one in panels.items() if len(one) > 1 and "uniform" in one}
    if not panels:
        return None
    figure, axes = _grid(1)
    for name, one in panels.items():
        axes[0].plot(list(one), [time / one["uniform"] for time in one.values()], marker="o", label=name)
    axes[0].axhline(1, color="black", linewidth=0.8)
    axes[0].set(ylabel="ours: time / time with uniform routing")
    axes[0].legend(fontsize=7)
    return "skew", figure


def publish(source: Path, page: Path) -> list[Path]:
    """docs/benchmarks.md and its plots, from a committed results file."""
    results = json.loads(source.read_text())
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    drawn = plots(results, folder / source.stem)
    lines = [
        "# Benchmarks",
        "",
        f"Generated from [{source.name}]({Path('..') / 'benchmarks' / 'results' / source.name}) by "
        f"`python -m benchmarks --publish`; do not edit. Measured {results['when']}.",
        "",
        *(line + "\n" for line in summary(results)),
        "A figure is the median of interleaved samples, with quartiles. cold: weights are out of the caches. "
        '"ours is": how many times faster the better of ours is, or ours beside it where the peer has a '
        'process of its own. "of limit": the least time that the probed limits allow, over the time. error: '
        "root mean square, relative to that of the answer.",
        "",
        *(f"![{path.stem}]({folder.name}/{path.name})" for path in drawn),
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
        *("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows(results)),
    ]
    page.write_text("\n".join(lines) + "\n")
    return [page, *drawn]
