"""The benchmark of trees runs, and the README's section can be made of what it writes."""

import json
import subprocess
import sys

import pytest

from benchmarks.bench_trees import ROWS
from benchmarks.pages import decoding
from tests.common.worker import HANGS, REPOSITORY

TREE = "tree of 4 nodes, depth 3, top-k 2"

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def report(fresh_process, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    small = ["--size", "30M", "--dtype", "float32", "--speed-chains", "2", "--speed-trees", "4x3x2"]
    short = ["--num-wide-prompts", "1", "--rounds", "1", "--max-tokens", "24"]
    parts = ["--parts", "speed", "products", "profile"]
    output = folder / "trees.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_trees.py", *parts, *small, *short, "--output", output],
        capture_output=True,
        text=True,
        timeout=HANGS,
        cwd=REPOSITORY,
        check=False,
        env=fresh_process["env"] | {"MSD_CACHE_DIR": str(folder)},
        preexec_fn=fresh_process["preexec_fn"],
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return json.loads(output.read_text())


def test_products_are_those_of_the_passes(report):
    products = report["products"]
    by_rows = products["milliseconds_by_rows"]
    target, draft = by_rows["target"], by_rows["draft"]
    # One pass over five rows and three over two, as the tree of the run has them.
    assert products["milliseconds_per_verification"][TREE] == target["5"] + 3 * draft["2"]
    assert products["milliseconds_per_verification"]["no speculation"] == target["1"]
    # Four matrices a layer and a head: the target has nine layers at 30M, the draft one and a
    # matrix that joins embedding and hidden state.
    assert products["matrices"] == {"target": 4 * 9 + 1, "draft": 4 + 1 + 1}
    # No time is compared with another: the machine may be busy during either.
    for times in (target, draft):
        assert {*map(int, times)} == {*ROWS, 2 + 1, 4 + 1, 2, 1} and min(times.values()) > 0


def test_parts_of_a_step_add_up(report):
    profile = report["profile"]
    *parts, whole = profile["milliseconds_per_step"].values()
    assert whole == pytest.approx(sum(parts)) and min(parts) > 0
    assert profile["steps"] > 0


def test_section_of_the_readme(report):
    text = decoding.trees("trees.json", report)
    assert f"| {TREE} | " in text and "tokens/s at most" in text and "| whole step | " in text
