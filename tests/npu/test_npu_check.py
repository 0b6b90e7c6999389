# SPDX-License-Identifier: Apache-2.0
"""`npu-check` as a whole, on the emulator: every check passes there, and the report says that it was one."""

import json
import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from pathlib import Path
from ffn_ops import emulator
emulator.enable()
from ffn_ops import npu_check
npu_check.main(Path(sys.argv[1]))
"""


def test_the_report_of_an_emulator_says_so(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command, root = [sys.executable, "-c", CODE, str(report)], Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "of an emulator: it says nothing about an NPU" in result.stdout
    found = json.loads(report.read_text())
    assert found["emulated"] and found["problems"] == []
    checks = found["checks"]
    assert list(checks) == ["modes", "activations", "ordering", "no_synchronisation", "times"]
    assert all(check["ok"] for check in checks.values()), checks
    assert len(checks["modes"]["equal"]) == 17
