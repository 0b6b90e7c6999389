# SPDX-License-Identifier: Apache-2.0
"""What is shown of a results file: the table, the plots, what became slower, and docs/benchmarks.md."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.cases import EVICTED_BY
from benchmarks.machine import DRIFT, drift
from benchmarks.peers import OURS, OURS_NAMES

Results = dict[str, Any]
# What csrc/cpu/probe.cc measures, with all threads at once.
LIMITS = {
    "fma": "fma, float32 multiply-adds in registers:",
    "bf16": "bf16, dot products of bf16 in registers:",
    "vnni": "vnni, int8 products in registers:",
    "amx_bf16": "amx_bf16, bf16 tiles in registers:",
    "amx_int8": "amx_int8, int8 tiles in registers:",
    "dram": "dram, reads from memory on huge pages:",
}
# A figure has become slower when it is beyond the old one by more than this and by more than both spreads.
SLOWER = 0.1
EMULATED = "Measured on the emulator: these times say nothing about an NPU."


def cell_name(cell: dict[str, Any]) -> str:
    more = "".join(f", {cell[key]}" for key in ("routing", "part") if cell.get(key))
    return f"{cell['shape']}, {cell['mode']}, M = {cell['M']}, {cell['start']}{more}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-2 else f"{seconds * 1e3:.1f} ms"


def our_seconds(cell: dict[str, Any], device: str = "cpu") -> float | None:
    """The better of ours."""
    times = [cell["results"].get(name, {}).get("seconds") for name in OURS[device]]
    return min((time for time in times if time), default=None)


def over_ours(cell: dict[str, Any], result: dict[str, Any]) -> float | None:
    """A peer's time over that of ours in the same process."""
    if result.get("over_ours"):
        return result["over_ours"]
    # Noisy, or of a file from when ratios were of medians.
    mine = result.get("anchor_seconds") or our_seconds(cell, result["device"])
    return result["seconds"] / mine if mine else None


def best_peer(cell: dict[str, Any], device: str = "cpu") -> tuple[str, float] | None:
    """The fastest, by name, and its time: as if it had run where and when ours did."""
    mine = our_seconds(cell, device)
    times = {
        name: mine * over if mine and (over := over_ours(cell, result)) else result["seconds"]
        for name, result in _timed(cell).items()
        if name not in OURS_NAMES and result["device"] == device and not result["other_numerics"]
    }
    return min(times.items(), key=lambda one: one[1], default=None)


def eviction_note(results: Results) -> list[str]:
    """A sentence about results of before caches were emptied as they are now."""
    if results.get("evicted_by") == EVICTED_BY:
        return []
    return [
        "Cold samples of this file were taken after the last cache had been written, so they also pay for "
        "writing it back to memory: everyone alike, which makes ratios and shares of the limit smaller."
    ]


def warnings(results: Results) -> list[str]:
    found = eviction_note(results)
    if results.get("emulated"):
        found.append(EMULATED)
    limits, cells = results["limits"], results["cells"]
    # The Hugging Face benchmark's cells have their ratios themselves.
    timed = [result for cell in cells for result in (_timed(cell).values() if "results" in cell else [cell])]
    if timed and not any("over_ours" in result or "over" in result for result in timed):
        found.append(
            "Ratios of this file are of medians, and dram is what the probes before and after gave: the sum "
            "of the threads' own best rates, which is more than they have together."
        )
    moved = {name: by for name, by in drift(limits["before"], limits["after"]).items() if by > DRIFT}
    if moved:
        said = " and ".join(f"{name} moved by {by:.0%}" for name, by in moved.items())
        if set(moved) == {"dram"} and all(cell.get("dram") for cell in cells if cell.get("limit") == "dram"):
            what = "times of cells that memory bounds hold for their moment; ratios and shares of dram are of"
        else:
            what = "shares are of the better measurement, and only ratios mean much, since they are of"
        found.append(f"While this ran, {said}: {what} samples taken in turn.")
    return found


def of_limit(cell: dict[str, Any], seconds: float) -> str:
    """The share of the cell's limit, its name, and for memory the rate that it gave."""
    rate = cell.get("dram") if cell["limit"] == "dram" else None
    at = f" at {rate / 1e9:.0f} GB/s" if rate else ""
    return f"{cell['limit_seconds'] / seconds:.0%} {cell['limit']}{at}"


HEADINGS = ("cell", "peer", "median", "quartiles", "ours is", "of limit", "error", "samples")


def rows(results: Results) -> Iterator[tuple[str, ...]]:
    """One for each peer of each cell, without those that are for something else."""
    for cell in results["cells"]:
        first = True
        for name, result in cell["results"].items():
            if result["status"] == "unfit":
                continue
            head = cell_name(cell) if first else ""
            first = False
            if result["status"] != "timed":
                yield head, name, result["status"], *[""] * (len(HEADINGS) - 3)
                continue
            over = None if name in OURS_NAMES else over_ours(cell, result)
            ratio = "" if over is None else f"{over:.2f}x"
            low, high = result["quartiles"]
            limit = of_limit(cell, result["seconds"]) if "of_limit" in result else ""
            samples = f"{result['clean']}" + (f" ({result['dropped']} dropped)" if result["dropped"] else "")
            spread = f"{duration(low)} - {duration(high)}"
            error = f"{result['error']:.1e}"
            yield head, name, duration(result["seconds"]), spread, ratio, limit, error, samples


def reasons(results: Results) -> list[str]:
    """Why peers have no figure where they should."""
    cells: dict[tuple[str, str, str], int] = {}
    for cell in results["cells"]:
        for name, result in cell["results"].items():
            if result["status"] not in ("timed", "unfit"):
                key = (name, result["status"], result["reason"])
                cells[key] = cells.get(key, 0) + 1
    return [f"{name}, {status} in {_cells(count)}: {why}." for (name, status, why), count in cells.items()]


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"


def machine(results: Results) -> str:
    described, versions = results["machine"], results["versions"]
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"{described['cpu']} ({described['cpu_id']}), {results['settings']['threads']} threads, huge pages "
        f"{described['huge_pages']}, governor {described['governor']}, kernel {described['kernel']}, commit "
        f"{results['commit']}; {installed}."
    )


def limits(results: Results) -> list[str]:
    """What the machine could do, as the probe saw it before and after."""
    said = []
    for name, before in results["limits"]["before"].items():
        unit = "GB/s" if name == "dram" else "GFLOP/s"
        said.append(
            f"{LIMITS[name]} {before / 1e9:.1f}, then {results['limits']['after'][name] / 1e9:.1f} {unit}"
        )
    return [f"Limits ({results['limits']['drift']:.0%} drift): {'; '.join(said)}."]


def missing(results: Results) -> list[str]:
    """Everything that has no figure, and why."""
    lines = [f"{skip['shape']}, {skip['mode']}: skipped, {skip['reason']}." for skip in results["skipped"]]
    return reasons(results) + lines + [f"{name} is absent: {why}." for name, why in results["absent"].items()]


def summary(results: Results) -> list[str]:
    """Sentences about the run as a whole."""
    return [machine(results), *limits(results), *missing(results), *warnings(results)]


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
        figure.savefig(path, dpi=80, bbox_inches="tight")
        paths.append(path)
    import matplotlib.pyplot

    matplotlib.pyplot.close("all")
    return paths


def _timed(cell: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: result for name, result in cell.get("results", {}).items() if result["status"] == "timed"}


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
        if cell["start"] in ("idle", "call") or cell["routing"] not in (None, "uniform") or "part" in cell:
            continue
        for name, result in _timed(cell).items():
            over = None if name in OURS_NAMES else over_ours(cell, result)
            if over is not None:
                panel = panels.setdefault((cell["shape"], cell["mode"]), {})
                panel.setdefault(name, []).append((cell["M"], over))
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
        if mine and "operations" in cell:
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


def publish(sources: list[Path], page: Path) -> list[Path]:
    """docs/benchmarks.md and its plots, from results files alone, one for each machine."""
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    links = ", ".join(f"[{source.name}]({os.path.relpath(source, page.parent)})" for source in sources)
    lines = [
        "# Benchmarks",
        "",
        f"Generated from {links} by `python -m benchmarks --publish`; do not edit. The files have every "
        "figure, its quartiles and its samples, of every peer.",
        "",
        "Times are medians of interleaved samples. cold: the weights are out of the caches; idle: they are, "
        "and the threads have slept. of limit: the least time that the limit named allows, over the time; "
        "dram at a rate: what memory gave in turn with the samples. Best peer: the fastest of those whose "
        "answer is within the cell's bound; one in a process of its own is compared through ours beside it. "
        '"ours is": its time over ours, the median by round; its time: ours times that. bar: what that is to '
        "be. error: root mean square, relative to that of the answer; the peer's after the slash.",
        "",
    ]
    drawn = []
    for source in sources:
        results = json.loads(source.read_text())
        figures = plots(results, folder / source.stem)
        lines += [
            *_machine_lines(results, source.stem, [f"{folder.name}/{path.name}" for path in figures]),
            "",
        ]
        drawn += figures
    page.write_text("\n".join(lines[:-1]) + "\n")
    return [page, *drawn]


def _machine_lines(results: Results, name: str, figures: list[str]) -> list[str]:
    facts = [machine(results), *limits(results), *warnings(results)]
    lines = [
        f"## {name}",
        "",
        f"Measured {results['when']} at commit {results['commit']}.\n",
        *(line + "\n" for line in facts),
    ]
    cells = [cell for cell in results["cells"] if _timed(cell)]
    for shape in dict.fromkeys(cell["shape"] for cell in cells):
        lines += [f"### {shape}, {name}", "", *markdown(CELL_HEADINGS, cell_rows(results, shape)), ""]
    encoders = list(encoder_rows(results))
    if encoders:
        lines += [f"### Feed-forward blocks in the encoder, {name}", ""]
        lines += [*markdown(ENCODER_HEADINGS, encoders), ""]
    lines += [f"![{Path(figure).stem}]({figure})\n" for figure in figures]
    return [*lines, f"### Without a figure, {name}", "", *(f"- {line}" for line in missing(results))]


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    table = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in table]


CELL_HEADINGS = ("cell", "ours", "of limit", "best peer", "its time", "ours is", "bar", "error")


def cell_rows(results: Results, shape: str) -> Iterator[tuple[str, ...]]:
    by_name = {cell_name(cell): cell for cell in results["cells"]}
    pairs = [(cell, device) for cell in results["cells"] for device in OURS if cell["shape"] == shape
             and any(name in cell["results"] for name in OURS[device])]  # fmt: skip
    for cell, device in pairs:
        name = cell_name(cell).removeprefix(f"{shape}, ") + (" on NPU" if device == "npu" else "")
        mine = min((pair for pair in _timed(cell).items() if pair[0] in OURS[device]), default=None,
                   key=lambda pair: pair[1]["seconds"])  # fmt: skip
        if mine is None:
            yield name, "none", *[""] * (len(CELL_HEADINGS) - 2)
            continue
        seconds, peer = mine[1]["seconds"], best_peer(cell, device)
        limit = of_limit(cell, seconds) if "of_limit" in mine[1] else ""
        error = f"{mine[1]['error']:.1e}"
        shown = ("none", "", "")
        if peer is not None:
            shown = (peer[0], duration(peer[1]), f"{peer[1] / seconds:.2f}x")
            error += f" / {cell['results'][peer[0]]['error']:.1e}"
        yield (
            name,
            f"{duration(seconds)}",
            limit,
            *shown,
            bar(cell, seconds, by_name) if device == "cpu" else "",
            error,
        )


def bar(cell: dict[str, Any], seconds: float, by_name: dict[str, dict[str, Any]]) -> str:
    """What the cell must reach, and whether it does."""
    of, mode = cell["bar_of"], "bf16" if cell["bar_of"] == "ours in bf16" else cell["mode"]
    if of == "peer with bf16 x":
        mode = mode.replace("a16", "a16_bf16")
    other = by_name.get(cell_name({**cell, "mode": mode}))
    peer = other and best_peer(other)
    than = other and our_seconds(other) if of == "ours in bf16" else peer and peer[1]
    if not than:
        return ""
    is_met = "met" if than / seconds >= cell["bar"] else "missed"
    what = "" if of == "peer" else f" {of}, is {than / seconds:.2f}x"
    return f"{cell['bar']:g}x{what}: {is_met}"


ENCODER_HEADINGS = ("cell", "share of the original's time", "ours in them is", "ours in the whole is")


def encoder_rows(results: Results) -> Iterator[tuple[str, ...]]:
    """The blocks' share of the original's time in bf16, and how much faster ours makes blocks and whole."""
    wholes = {cell_name(cell): cell for cell in results["cells"] if cell.get("part") == "whole"}
    for name, whole in wholes.items():
        parts = [whole, *(cell for cell in results["cells"]
                          if cell_name(cell) == cell_name({**whole, "part": "feed-forward"}))]  # fmt: skip
        times = [(best_peer(cell), our_seconds(cell)) for cell in parts]
        if len(times) == 2 and all(peer and mine for peer, mine in times):
            (original, ours), (blocks, our_blocks) = ((peer[1], mine) for peer, mine in times)
            yield (
                name.removesuffix(", whole"),
                f"{blocks / original:.0%}",
                f"{blocks / our_blocks:.2f}x",
                f"{original / ours:.2f}x",
            )
