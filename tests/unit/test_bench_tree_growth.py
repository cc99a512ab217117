"""The benchmark of growing, rehearsed on a CPU: its comparisons and its record, not its times."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_rehearsal(tmp_path):
    out = tmp_path / "tiny.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tree_growth", "--tiny", "--out", str(out)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["top-k", "growth", "placing", "draft prefill"] * 2
    assert all("reason" not in row and row["microseconds"] > 0 for row in rows)
    assert {row["launches"] for row in rows if row["name"] == "growth"} == {10}
