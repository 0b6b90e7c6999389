# SPDX-License-Identifier: Apache-2.0
"""The benchmark's machinery on the shapes of tiny.toml: what it reports, never how long anything took."""

import copy
import json
import re
import subprocess
import sys
import time
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import encoder, machine, measure, report, run
from benchmarks.cases import EVICTED, SHAPES, SKEWED, UNIFORM, Case, Weights, read_shapes, route
from benchmarks.check import Answer
from benchmarks.peers import Eager, Ours
from ffn_ops import contract, packing

ROOT = Path(__file__).parents[1]
DENSE, MOE = read_shapes(SHAPES / "tiny.toml")
ROUTINGS = (UNIFORM, *SKEWED)
MISBEHAVING = [
    f"tests.bench_peers:{name}" for name in ("Wrong", "CrashesAtOnce", "CrashesLater", "Alone", "Absent")
]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results file of one run, with peers that misbehave."""
    file = tmp_path_factory.mktemp("bench") / "results.json"
    done = command("--quick", "--shapes", "tiny", "--modes", "bf16", "--threads", 1, "--isa", "generic",
                   "--peers", ",".join(["ours", "torch eager", *MISBEHAVING]), "--out", file)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return file


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text())


@pytest.fixture
def quiet(results: dict[str, Any]) -> dict[str, Any]:
    """The same, had the machine been so quiet that every sample was clean."""
    results = copy.deepcopy(results)
    figure = {"status": "timed", "seconds": 2e-3, "quartiles": [1e-3, 3e-3], "clean": 5, "pack_seconds": 1.0,
              "over_ours": 1.0}  # fmt: skip
    for cell in results["cells"]:
        for name in ("ours", "torch eager"):
            cell["results"][name].update(figure)
    return results


def test_a_run_writes_results(results: dict[str, Any]) -> None:
    assert results["settings"]["threads"] == 1 and results["settings"]["isa"] == "generic"
    assert results["versions"]["torch"] == torch.__version__
    assert {"cpu", "affinity", "governor", "page_bytes", "huge_pages"} <= set(results["machine"])
    assert all(rate > 0 for rate in results["limits"]["before"].values())
    planned = len(run.cells(DENSE, [])) + len(run.cells(MOE, []))
    assert len(results["cells"]) == planned
    for cell in results["cells"]:
        ours = cell["results"]["ours"]
        assert 0 <= ours["bound_share"] <= 1
        assert ours["status"] in ("timed", "noisy")  # a busy machine's affair
        if ours["status"] == "timed":
            low, high = ours["quartiles"]
            assert 0 < low <= ours["seconds"] <= high
            assert ours["clean"] >= measure.CLEAN and ours["of_limit"] > 0


def test_plots_are_drawn(quiet: dict[str, Any], tmp_path: Path) -> None:
    written = {path.name for path in report.write(quiet, tmp_path / "r.json") if path.stat().st_size}
    assert written == {"r.json", "r-speed-up.png", "r-roofline.png", "r-packing.png", "r-skew.png"}


def test_a_routed_cell_records_its_seed_and_histogram(results: dict[str, Any]) -> None:
    routed = [cell for cell in results["cells"] if cell["kind"] == "moe"]
    assert {cell["routing"] for cell in routed} == set(ROUTINGS)
    for cell in routed:
        assert len(cell["histogram"]) == MOE.E and sum(cell["histogram"]) == cell["M"] * MOE.top_k
    assert isinstance(results["settings"]["seed"], int)


def test_a_wrong_peer_is_reported_and_not_timed(results: dict[str, Any]) -> None:
    for cell in results["cells"]:
        wrong = cell["results"]["tests.bench_peers:Wrong"]
        assert wrong["status"] == "wrong" and "bound allows" in wrong["reason"] and "seconds" not in wrong


@pytest.mark.parametrize("name", ["CrashesAtOnce", "CrashesLater"])
def test_a_peer_that_crashes_is_reported_and_the_others_are_timed(results: dict[str, Any], name: str) -> None:
    for cell in results["cells"]:
        crashed = cell["results"][f"tests.bench_peers:{name}"]
        assert crashed["status"] == "crashed" and "died of SIGABRT" in crashed["reason"]


def test_a_peer_with_a_process_of_its_own_has_ours_beside_it(results: dict[str, Any]) -> None:
    for cell in results["cells"]:
        alone = cell["results"]["tests.bench_peers:Alone"]
        assert alone["status"] in ("timed", "noisy") and "over_ours" in alone
        assert alone["over_ours"] is None or alone["over_ours"] > 0  # None: one of them is noisy


def test_absent_peers_are_named(results: dict[str, Any]) -> None:
    assert results["absent"]["tests.bench_peers:Absent"] == "needs a machine that nobody has"
    assert any("nobody has" in sentence for sentence in report.summary(results))


def test_compare_names_what_became_slower(quiet: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "old.json"
    out.write_text(json.dumps(quiet))
    slower = copy.deepcopy(quiet)
    ours = slower["cells"][0]["results"]["ours"]
    ours["seconds"] *= 10
    ours["quartiles"] = [10 * time for time in ours["quartiles"]]
    (tmp_path / "new.json").write_text(json.dumps(slower))
    same, regressed = command("--compare", out, out), command("--compare", out, tmp_path / "new.json")
    assert (same.returncode, same.stdout) == (0, "0 figures became slower.\n")
    assert regressed.returncode == 1
    assert regressed.stdout.startswith("tiny dense, bf16, M = 1, cold: ours takes")


def test_a_published_page_names_its_results_and_has_a_row_for_every_cell(
    quiet: dict[str, Any], tmp_path: Path
) -> None:
    source, page = tmp_path / "quiet.json", tmp_path / "benchmarks.md"
    for cell in quiet["cells"]:
        del cell["results"]["tests.bench_peers:Alone"]  # whose time is its own
    source.write_text(json.dumps(quiet))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(quiet | {"when": "another day"}))
    report.publish([source, other], page)
    whole = page.read_text()
    assert "[quiet.json](quiet.json), [other.json](other.json)" in whole and quiet["commit"] in whole
    text, another = re.split("^## (?:quiet|other)$", whole, flags=re.MULTILINE)[1:]
    assert quiet["when"] in text
    assert another.strip() == text.strip().replace("quiet", "other").replace(quiet["when"], "another day")
    for cell in quiet["cells"]:
        name = report.cell_name(cell).removeprefix(f"{cell['shape']}, ")
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert "| 2000 us |" in row and "| torch eager | 2000 us | 1.00x |" in row
        assert ("| 1.5x: missed |" if cell["bar"] > 1 else "| 1x: met |") in row
    assert "CrashesLater, crashed in" in text and "nobody has" in text


def test_the_best_peer_is_compared_within_its_process_and_with_the_same_numerics() -> None:
    figure = {"status": "timed", "device": "cpu", "other_numerics": False, "over_ours": None}
    cell = {"results": {
        "ours": {**figure, "seconds": 1.0},
        "torch eager": {**figure, "seconds": 3.0},
        "elsewhere": {**figure, "seconds": 5.0, "over_ours": 2.5},  # where ours took twice as long
        "cruder": {**figure, "seconds": 0.1, "over_ours": 0.1, "other_numerics": True},
    }}  # fmt: skip
    assert report.best_peer(cell) == ("elsewhere", 2.5)


def test_what_is_not_reached_in_time_is_skipped_with_the_reason() -> None:
    options = run.Options([DENSE], ["bf16"], [], 1, None, ["ours"], 0.1, 1)
    cells = run.measure_shape(DENSE, "bf16", options, ["ours"], time.monotonic(), lambda *_: None)
    assert [cell["results"]["ours"] for cell in cells] == len(cells) * [
        {"status": "skipped", "reason": "the time was over"}
    ]


@pytest.mark.parametrize("part", encoder.PARTS)
def test_the_encoder_with_our_blocks_is_an_answer_and_noise_is_not(
    encoder_models: encoder.Models, part: str
) -> None:
    with torch.inference_mode():
        case = encoder.Case(encoder_models, 2, "warm", part)
        answer = encoder.Answer(case)
        for peer in (encoder.OursInEncoder(), encoder.Original(), encoder.OriginalFloat32()):
            assert answer.judge(peer.make(case)()).reason is None
    assert answer.judge(torch.randn_like(answer.value)).reason is not None


@pytest.fixture(scope="module")
def encoder_models() -> encoder.Models:
    with torch.inference_mode():
        return encoder.Models(read_shapes(SHAPES / "encoder.toml")[0], "w8a8_bf16")


def test_limits_that_drift_mark_a_run(results: dict[str, Any]) -> None:
    before = results["limits"]["before"]

    def said(**factors: float) -> str:
        after = {name: rate * factors.get(name, 1.0) for name, rate in before.items()}
        return " ".join(report.warnings({**results, "limits": {"before": before, "after": after}}))

    assert "moved" not in said() and "moved" not in said(dram=1.09)
    assert "dram moved by 20%: times of cells that memory bounds" in said(dram=0.8)
    assert "fma moved by 20% and dram moved by 50%: shares are of the better" in said(fma=1.2, dram=1.5)


def test_cells_that_memory_may_bound_have_its_rate_beside_them(quiet: dict[str, Any]) -> None:
    for cell in quiet["cells"]:
        assert (cell.get("dram", 0) > 0) == (cell["start"] in EVICTED)
    cell = {**quiet["cells"][0], "bytes": 6e9, "operations": 1.0, "dram": 3e9}
    run.set_limit(cell, quiet["limits"]["before"])
    assert (cell["limit"], cell["limit_seconds"]) == ("dram", 2.0)
    assert cell["results"]["ours"]["of_limit"] == 2.0 / 2e-3
    assert report.of_limit(cell, 4.0) == "50% dram at 3 GB/s"


def test_the_rate_of_memory_is_what_all_threads_have_together(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [(0.0, 1.0), (1.0, 4.0)]  # one thread after the other
    with machine.Memory(2) as memory:
        monkeypatch.setattr(machine._Together, "__call__", lambda self, call: spans)
        assert memory.rate() == sum(map(len, memory._maps)) / 4.0


def test_a_figure_needs_five_clean_samples() -> None:
    switches = count(0, 2)  # two more whenever it is looked at: no sample is clean
    figures, _ = measure.interleaved({"a": lambda: None}, "warm", 0, switches=lambda: next(switches))
    samples: list[float | None] = measure.MAX_ROUNDS * [None]
    assert figures["a"] == measure.Figure(None, None, 0, measure.MAX_ROUNDS, samples)
    assert measure.summarize([1.0] * 4).seconds is None
    samples = [1.0, 2.0, 3.0, None, 4.0, 5.0]
    assert measure.summarize(samples) == measure.Figure(3.0, (2.0, 4.0), 5, 1, samples)


def test_a_ratio_is_of_samples_of_the_same_round() -> None:
    ours = measure.summarize([1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0])  # the machine became slower
    peer = measure.summarize([None, None, 2.0, 2.0, 6.0, 6.0, 6.0])
    assert peer.seconds and ours.seconds and peer.seconds / ours.seconds != 2
    assert measure.ratio(peer, ours) == 2
    assert measure.ratio(measure.summarize([None] * 3 + [1.0] * 4), ours) is None
    apart = measure.summarize([1.0] * 5 + [None] * 5), measure.summarize([None] * 5 + [4.0] * 5)
    assert measure.ratio(*apart) == 0.25  # of medians


def test_calls_are_measured_in_turn_and_none_behind_itself() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    measure.interleaved(calls, "warm", 0, switches=lambda: 0)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) >= measure.CLEAN and rounds == (["abc", "bac"] * len(rounds))[: len(rounds)]
    assert all(one != following for one, following in pairwise(order))
    behind = {pair for pair in pairwise(order) if pair[1] == "c"}
    assert behind == {("b", "c"), ("a", "c")}


@pytest.mark.parametrize("mode", [mode.name for mode in contract.MODES] + ["w8a16:32", "w4a16_bf16:32"])
@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_the_operator_is_within_every_cells_bound(shape: Any, mode: str) -> None:
    case = Case(Weights(shape._replace(activation="relu"), mode), 8, "warm", "uniform" if shape.E else None)
    verdict = Answer(case).judge(Ours().make(case)())
    assert verdict.reason is None and verdict.error < 0.1


def test_the_bound_notices_exchanged_glu_halves() -> None:
    case = Case(Weights(MOE, "bf16"), 8, "warm", "uniform")
    weights = case.weights.operands
    swapped = {**weights, "weight1": packing.swap_glu_halves(weights["weight1"])}
    y = torch.ops.ffn.moe(case.x, *case.routing, **swapped)  # type: ignore[misc]
    assert Answer(case).judge(y).reason is not None
    assert Answer(case).judge(Eager().make(case)()).reason is None


def test_routings_do_what_they_say() -> None:
    M = 64
    histograms = {
        name: torch.bincount(route(MOE, name, M).ids.flatten(), minlength=MOE.E) for name in ROUTINGS
    }
    assert histograms["one-expert"][0] == M
    assert histograms["empty-experts"][: MOE.E // 2].sum() == 0
    assert histograms["zipf"][0] > histograms["zipf"][-1]
    for name in ROUTINGS:
        ids = route(MOE, name, M).ids
        assert all(len(set(row)) == MOE.top_k for row in ids.tolist())


def test_shape_files_can_be_read_and_name_their_models() -> None:
    shapes = [shape for file in SHAPES.glob("*.toml") for shape in read_shapes(file)]
    assert len({shape.name for shape in shapes}) == len(shapes) > 10
    assert all("config.json" in shape.model or shape.model.startswith("none") for shape in shapes)


def test_a_shape_that_does_not_fit_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.machine.free_bytes", lambda: 1000)
    assert "more than half of the" in (run.too_large(DENSE, "bf16") or "")
