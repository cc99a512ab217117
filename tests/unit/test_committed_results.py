"""The committed result files and what the pages show of them: no code is tested here.

A failure means that a file, a table or the chart was not made again, not that something broke.
"""

import json
from pathlib import Path

import pytest

from benchmarks.pages import __main__ as pages
from benchmarks.pages import chart
from tests.common.server_soak import leaks
from tests.long.soak import PARTS, failures

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", pages.DOCUMENTS)
def test_a_pages_results_are_those_of_the_files(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    message = "run: python -m benchmarks.pages"
    assert pages.updated(text, pages.section(name)) == text, message


@pytest.mark.parametrize("name", pages.charts())
def test_the_charts_show_the_files(name):
    content, _ = pages.charts()[name]
    assert chart.shows(ROOT / name, content), "run: python -m benchmarks.pages"


def test_long_runs_are_complete_and_hold():
    result = json.loads((ROOT / "benchmarks/results/soak.json").read_text())
    assert set(result) == set(PARTS)
    for part, report in result.items():
        assert not report["provenance"]["settings"]["quick"]
        assert failures(part, report) == report["failures"] == []


def test_serving_met_its_faults():
    result = json.loads((ROOT / "benchmarks/results/faults.json").read_text())
    configs, requests = result["config-fuzz"], result["request-fuzz"]
    statuses = requests["statuses"]
    assert configs["served"] + configs["refused"] >= 2000 <= sum(statuses.values())
    failed = sum(count for status, count in statuses.items() if status >= "5")
    assert failed <= requests["errors_of_vllm"] and not requests["server_ended"]
    for run in ("first", "second"):
        soak = result[f"server-soak-{run}"]
        assert soak["requests"] >= 1000 and 0 < soak["accepted"] < soak["verified"]
        assert soak["different"] == soak["left_running"] == 0
        assert soak["held"] == {} and soak["leaks"] == leaks(soak["memory_growth"]) == []
