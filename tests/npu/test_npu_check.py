# SPDX-License-Identifier: Apache-2.0
"""`npu-check` as a whole, on the emulator: every check passes there, and the report says that it was one."""

import json
import subprocess
import sys
from pathlib import Path

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
    assert list(checks) == ["modes", "activations", "ordering", "no_synchronisation", "times"]
    assert all(check["ok"] for check in checks.values()), checks
    assert len(checks["modes"]["equal"]) == 17


def test_without_cann_it_says_that_no_check_ran(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "ffn_ops", "npu-check", "--report", str(report)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stdout.endswith(f"no check ran; {report} has what was found instead\n")
    found = json.loads(report.read_text())
    assert found["problems"] and found["checks"] == {}
