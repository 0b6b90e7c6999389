# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.hugging_face`: the experts of Hugging Face's models, as transformers computes them
and as ffn_ops does.

    python -m benchmarks.hugging_face [MODEL ...] [--out FILE.json] [--publish FILE.json ...]

One experts module of each model, of the real sizes but with fewer experts where memory asks for it, called as
the model calls it: from hidden states, expert ids and weights to the sum. Implementations of a cell are timed
in turn in one process (measure.py): transformers' own, ffn_ops with the model's parameters, and after
ffn_ops.hf.pack_. docs/moe-benchmarks.md is made from results files by --publish.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn

from benchmarks import cases, machine, measure

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "moe-benchmarks.md"
SECONDS = 1.0  # for each implementation of a cell
ROWS = (1, 8, 512)  # two sizes of a decoding batch, and a prompt
# An implementation is not measured when a call takes longer than PATIENCE, nor tried when by its time with
# fewer rows it would take HOPELESS. So slow are torch's products of bf16 on CPUs without such instructions.
PATIENCE, HOPELESS = 10.0, 60.0  # seconds
GATHERED = 4 << 30  # batched_mm copies each token's weights: more bytes than this are not tried
OURS = ("ffn_ops", "ffn_ops, packed")


class Model(NamedTuple):
    name: str
    config: str  # of transformers, whose defaults are changed by `sizes`
    experts: str  # class
    module: str
    sizes: dict[str, int]
    H: int
    I: int  # noqa: E741 - the field's name
    E: int  # experts here
    of: int  # experts of the model
    top_k: int
    matrices: int = 3  # of I * H weights in an expert
    patched: bool = False  # ffn_ops.patch, since no experts implementation reaches it


MODELS = (
    Model("Mixtral-8x7B", "MixtralConfig", "MixtralExperts", "mixtral",
          {"num_local_experts": 4}, 4096, 14336, 4, 8, 2),
    Model("Qwen3-30B-A3B", "Qwen3MoeConfig", "Qwen3MoeExperts", "qwen3_moe",
          {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128}, 2048, 768, 128, 128, 8),
    Model("DeepSeek-V3", "DeepseekV3Config", "DeepseekV3Experts", "deepseek_v3",
          {"n_routed_experts": 24, "num_local_experts": 24}, 7168, 2048, 24, 256, 8),
    Model("GPT-OSS-20B", "GptOssConfig", "GptOssExperts", "gpt_oss",
          {"num_local_experts": 16}, 2880, 2880, 16, 32, 4),
    Model("Switch-base-8", "SwitchTransformersConfig", "SwitchTransformersExperts", "switch_transformers",
          {"d_model": 768, "d_ff": 3072, "num_experts": 8}, 768, 3072, 8, 8, 1, 2, patched=True),
)  # fmt: skip


def experts_of(model: Model, dtype: torch.dtype) -> nn.Module:
    transformers = __import__("transformers")
    config = getattr(transformers, model.config)(**model.sizes)
    config._experts_implementation = "eager"
    module = getattr(getattr(transformers.models, model.module), f"modeling_{model.module}")
    experts = getattr(module, model.experts)(config).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(cases.SEED)
    for parameter in experts.parameters():
        parts = list(parameter) if parameter.dim() == 3 else [parameter]
        base = torch.randn(parts[0].shape, generator=generator) / parts[0].shape[-1] ** 0.5
        for e, one in enumerate(parts):
            one.copy_(base.roll(e, 0))  # other bytes in memory at a fraction of the time
    return experts


def implementations(
    experts: Any, packed: Any, model: Model, call: tuple[Tensor, ...]
) -> dict[str, Callable[[], Tensor]]:
    def run(module: Any, name: str) -> Callable[[], Tensor]:
        def once() -> Tensor:
            module.config._experts_implementation = name
            return module(*call)

        return once

    if model.patched:
        x, ids, weights = call
        chosen = nn.functional.one_hot(ids, model.E)  # [M, 1, E], as Switch's router gives it
        return {"eager": lambda: experts(x, chosen, weights), OURS[0]: lambda: packed(x, chosen, weights)}
    found = {"eager": run(experts, "eager"), "grouped_mm": run(experts, "grouped_mm")}
    gathered = len(call[0]) * model.top_k * model.matrices * model.I * model.H * call[0].element_size()
    if gathered <= GATHERED:
        found["batched_mm"] = run(experts, "batched_mm")
    return found | {OURS[0]: run(experts, "ffn_ops"), OURS[1]: run(packed, "ffn_ops")}


@torch.no_grad()
def measure_model(model: Model, limits: dict[str, float], memory: machine.Memory) -> Iterator[dict[str, Any]]:
    import ffn_ops.hf

    for dtype in (torch.bfloat16, torch.float32):
        experts = experts_of(model, dtype)
        weight_bytes = sum(p.nbytes for p in experts.parameters())
        copies = 1.2 if dtype == torch.float32 else 3.2  # packed, and in float32
        if copies * weight_bytes > machine.free_bytes():
            yield {
                "model": model.name,
                "dtype": str(dtype)[6:],
                "skipped": "its copies need more than the free memory",
            }
            continue
        packed: Any = copy.deepcopy(experts)
        begin = time.perf_counter()
        if model.patched:
            ffn_ops.patch(packed)
        else:
            packed.config._experts_implementation = ffn_ops.hf.NAME
            ffn_ops.hf.pack_(packed)
        pack_seconds = time.perf_counter() - begin
        truth = experts if dtype == torch.float32 else copy.deepcopy(experts).float()
        cells = [(M, cases.UNIFORM) for M in ROWS]
        if dtype == torch.bfloat16:
            cells += [(ROWS[-1], name) for name in cases.SKEWED]
        expected: dict[str, float] = {}  # of a call, by its time with one row
        for M, routing in cells:
            shape = cases.Shape(model.name, "", model.H, model.I, "swiglu", False, ROWS, model.E, model.top_k)
            ids, weights = cases.route(shape, routing, M)
            x = torch.randn(M, model.H, generator=torch.Generator().manual_seed(1)).to(dtype)
            calls = implementations(experts, packed, model, (x, ids, weights))
            right = implementations(truth, packed, model, (x.float(), ids, weights))["eager"]()
            slow = [name for name in calls if M * expected.get(name, 0) > HOPELESS]
            # Roundings to the dtype on the way of both, and of the float32 sums: root mean squares.
            unit = 16 * torch.finfo(dtype).eps / 2 + (model.H + model.I) * 2.0**-24
            wrong = {}
            for name in [name for name in calls if name not in slow]:
                begin = time.perf_counter()
                y = calls[name]()
                if time.perf_counter() - begin > PATIENCE:
                    slow.append(name)
                    expected[name] = math.inf
                wrong[name] = float((y.float() - right).norm() / right.norm() / unit)
            for name in slow:
                del calls[name]
            hit = len(ids.unique())
            expert = model.matrices * model.I * model.H
            start = "cold" if cases.COLD_ROWS["moe"] >= M else "warm"
            read = hit * expert * x.element_size()
            bound = measure.bound_by_memory(start, read)
            figures, rate = measure.interleaved(calls, start, SECONDS, memory=memory if bound else None)
            expected |= {name: figure.seconds / M for name, figure in figures.items() if figure.seconds}
            least = compute_time(limits, dtype, 2 * M * model.top_k * expert)
            if rate is not None:
                least["dram"] = read / rate
            limit = max(least, key=least.__getitem__)
            yield {
                "model": model.name, "dtype": str(dtype)[6:], "M": M, "routing": routing, "experts_hit": hit,
                "limit": limit, "limit_seconds": least[limit], "dram": rate, "pack_seconds": pack_seconds,
                "error": wrong, "slow": slow,
                "seconds": {name: f.seconds for name, f in figures.items() if wrong[name] <= 1},
                "quartiles": {name: f.quartiles for name, f in figures.items()},
                "over": {ours: {name: measure.ratio(f, figures[ours]) for name, f in figures.items()}
                         for ours in OURS if ours in figures},
                "histogram": ids.flatten().bincount(minlength=model.E).tolist(),
            }  # fmt: skip
        del experts, packed, truth


def compute_time(limits: dict[str, float], dtype: torch.dtype, operations: float) -> dict[str, float]:
    name, rate = machine.compute_limit(limits, {torch.bfloat16: "bfloat16"}.get(dtype, "float32"))
    return {name: operations / rate}


def line(cell: dict[str, Any]) -> list[str]:
    """A row of the table: all times, and how ours compare with the best of transformers and the limit. Files
    from before ratios were by round have none."""
    from benchmarks import report

    theirs = {name: s for name, s in cell["seconds"].items() if name not in OURS and s}
    best = min(theirs, key=theirs.__getitem__, default="")

    def ms(name: str) -> str:
        if name in cell.get("slow", ()):
            return "slow"
        seconds = cell["seconds"].get(name)
        return f"{seconds * 1e3:.2f}" if seconds else "-"

    def over(name: str, base: str) -> str:
        ours, other = cell["seconds"].get(name), theirs.get(base)
        if not ours or not other:
            return "-"
        ratio = cell["over"][name][base] if "over" in cell else other / ours
        return f"{ratio:.2f}x"

    mine = OURS[1] if cell["seconds"].get(OURS[1]) else OURS[0]
    seconds = cell["seconds"].get(mine)
    routing = "" if cell["routing"] == cases.UNIFORM else f", {cell['routing']}"
    return [
        f"{cell['dtype']}, M = {cell['M']}{routing}",
        *(ms(name) for name in ("eager", "grouped_mm", "batched_mm", *OURS)),
        over(OURS[0], "grouped_mm"), over(OURS[1], "grouped_mm"), f"{over(mine, best)} {best}".strip(),
        report.of_limit(cell, seconds) if seconds else "-",
    ]  # fmt: skip


HEADINGS = ("cell", "eager ms", "grouped_mm ms", "batched_mm ms", "ffn_ops ms", "packed ms",
            "plain over grouped_mm", "packed over grouped_mm", "ours over the best",
            "ours, of limit")  # fmt: skip


def publish(sources: list[Path]) -> None:
    """docs/moe-benchmarks.md, with a plot of the skewed routings for each machine, from results files."""
    links = ", ".join(f"[{source.name}](../benchmarks/results/{source.name})" for source in sources)
    lines = [
        "# Hugging Face's experts: benchmarks",
        "",
        f"Generated from {links} by `python -m benchmarks.hugging_face --publish`; do not edit.",
        "",
        "One experts module, from hidden states, ids and weights to y; medians of interleaved samples, and "
        "of their ratios by round. M is 1 or 8 tokens of decoding with cold weights, or a prompt of 512. "
        "plain: ffn_ops with the model's own parameters (Switch: after `ffn_ops.patch`); packed: after "
        "`ffn_ops.hf.pack_`; ours: packed if there is that. of limit: the least time that reading the "
        "weights of the experts hit, or the arithmetic, takes on this machine, over the time; dram at a "
        "rate: what memory gave in turn with the samples. zipf, one-expert and empty-experts are skewed "
        "routings (benchmarks/cases.py). slow: not "
        f"measured, since a call takes more than {PATIENCE:.0f} s, or would take a minute by its time with "
        "fewer rows.",
        "",
    ]
    for source in sources:
        lines += machine_lines(json.loads(source.read_text()), source.stem)
    PAGE.write_text("\n".join(lines))


def machine_lines(results: dict[str, Any], name: str) -> list[str]:
    from benchmarks import report

    before, after = results["limits"]["before"], results["limits"]["after"]
    limits = (f"{limit} {before[limit] / 1e9:.1f}, then {after[limit] / 1e9:.1f} G/s" for limit in before)
    versions = results["versions"]
    lines = [
        f"## {name.removesuffix('-hf')}",
        "",
        f"{results['machine']['cpu']}, {results['threads']} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; measured {results['time']} at commit {results['commit'][:12]}. "
        f"Limits: {'; '.join(limits)} ({results['drift']:.0%} drift).",
        "",
    ]
    for note in report.warnings(results):
        lines += [note, ""]
    for cell in results["cells"]:
        if "limit" in cell and not (cell["limit"] == "dram" and cell.get("dram")):
            limit = cell["limit"]
            cell["limit_seconds"] *= before[limit] / max(before[limit], after[limit])
    for model in MODELS:
        found = [cell for cell in results["cells"] if cell["model"] == model.name]
        if not found:
            continue
        sizes = f"H = {model.H}, I = {model.I}, {model.E} of {model.of} experts, top-{model.top_k}."
        table = report.markdown(HEADINGS, [line(cell) for cell in found if "skipped" not in cell])
        lines += [f"### {model.name}, {name.removesuffix('-hf')}", "", sizes, "", *table, ""]
        lines += [f"{cell['dtype']}: {cell['skipped']}." for cell in found if "skipped" in cell]
    picture = plot_skew(results, PAGE.with_suffix("") / f"{name}-skew.png")
    return [*lines, f"![Times by routing]({picture.relative_to(PAGE.parent)})", ""]


def plot_skew(results: dict[str, Any], out: Path) -> Path:
    """Time of a prompt in bf16 over the uniform routing's, by model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    routings = (cases.UNIFORM, *cases.SKEWED)
    figure, all_axes = pyplot.subplots(1, len(MODELS), figsize=(3.2 * len(MODELS), 3.2), squeeze=False)
    for axes, model in zip(all_axes[0], MODELS, strict=True):
        prompts = [c for c in results["cells"] if c.get("M") == ROWS[-1] and c["dtype"] == "bfloat16"]
        found = {c["routing"]: c["seconds"] for c in prompts if c["model"] == model.name}
        for name in ("grouped_mm", *OURS):
            times = [found.get(routing, {}).get(name) for routing in routings]
            axes.plot(routings, [t and t * 1e3 for t in times], marker="o", label=name)
        axes.set_title(model.name)
        axes.set_ylim(bottom=0)
        axes.tick_params(axis="x", rotation=30)
    all_axes[0][0].set_ylabel("ms, 512 tokens, bf16")
    all_axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    return out


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Names; all by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the results go, as JSON.")] = None,
    publish_from: Annotated[
        list[Path] | None, typer.Option("--publish", help="Make the page from results; may be repeated.")
    ] = None,
) -> None:
    if publish_from:
        return publish(publish_from)
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    chosen = [model for model in MODELS if not models or model.name in models]
    if not chosen:
        raise typer.BadParameter(f"none of {', '.join(model.name for model in MODELS)} is among {models}")
    threads, console = torch.get_num_threads(), Console(width=200)
    results: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.hugging_face", *(models or ())]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": threads, "machine": machine.describe(),
        "versions": machine.versions(), "commit": machine.commit(ROOT),
        "evicted_by": cases.EVICTED_BY, "cells": [],
    }  # fmt: skip
    before = machine.probe(threads)
    for model in chosen:
        table = Table(*HEADINGS, title=f"{model.name}: {model.E} of {model.of} experts")
        # On a terminal a row at a time, drawn between samples: a thread that redraws would disturb them.
        with machine.Memory(threads) as memory, Live(table, console=console, auto_refresh=False) as live:
            for cell in measure_model(model, before, memory):
                results["cells"].append(cell)
                table.add_row(*(line(cell) if "skipped" not in cell else [cell["dtype"], cell["skipped"]]))
                live.refresh()
    after = machine.probe(threads)
    results |= {
        "limits": {"before": before, "after": after},
        "drift": max(machine.drift(before, after).values()),
    }
    if out is not None:
        out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.exit(typer.run(main))
