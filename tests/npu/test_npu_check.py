# SPDX-License-Identifier: Apache-2.0
"""`npu-check` as a whole, on the emulator: every check passes there, and the report says that it was one."""

import json
import subprocess
import sys
from pathlib import Path

import torch

import ffn_ops
from ffn_ops import npu_check

ROOT = Path(__file__).parents[2]


def test_the_report_of_an_emulator_says_so(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = ["-m", "ffn_ops.emulator", "-m", "ffn_ops", "npu-check", "--report", str(report)]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "of an emulator: it says nothing about an NPU" in result.stdout
    found = json.loads(report.read_text())
    assert found["emulated"] and found["problems"] == []
    checks = found["checks"]
    assert list(checks) == ["modes", "experts", "activations", "ordering", "no_synchronisation", "times"]
    assert all(check["ok"] for check in checks.values()), checks
    assert len(checks["modes"]["equal"]) == 17
    assert len(checks["experts"]["equal"]) == 4
    assert len(checks["no_synchronisation"]["calls"]) == 5


def test_calls_of_the_experts_are_exact_and_go_both_ways() -> None:
    routes = set()
    for call in npu_check.moe_calls().values():
        x, w1, w2 = (call[name].double() for name in ("x", "weight1", "weight2"))
        h = torch.einsum("mk,ekn->emn", x, w1)
        if call["activation"] == "relu":
            h = h.relu()
        else:
            left, right = h.chunk(2, -1)
            assert max(left.abs().max(), right.abs().max()) <= 256
            h = left * right.relu()
        results = torch.einsum("emn,enk->emk", h, w2)
        assert max(h.abs().max(), results.abs().max()) <= 128  # so that two of them add up to 256 at most
        results = torch.cat((results, torch.zeros_like(results[:1])))  # of a skipped id
        rows = torch.arange(len(x))[:, None]
        y = (results[call["topk_ids"], rows] * call["topk_weights"][..., None]).sum(1)
        assert torch.equal(torch.ops.ffn.moe(**call).double(), y)
        tokens = call["topk_ids"].flatten().bincount(minlength=5)
        assert tokens[3] == 0 and tokens[4] == 4
        routes.add(ffn_ops.explain(**call, target="ascend910b").route)
    assert routes == {"fused", "grouped"}


def test_without_cann_it_says_that_no_check_ran(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "ffn_ops", "npu-check", "--report", str(report)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stdout.endswith(f"no check ran; {report} has what was found instead\n")
    found = json.loads(report.read_text())
    assert found["problems"] and found["checks"] == {}
