"""Engines of random weights accept what the table says, under both model runners."""

import json
import subprocess
import sys

import pytest

from tests.common.replayed_acceptance import TOKENS
from tests.common.worker import HANGS, REPOSITORY, run_worker
from vllm_msd.bench.arms import parse_arms
from vllm_msd.bench.replay import shape_of
from vllm_msd.budget import expected_tree, ratio_for


@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.long)])
def test_acceptance_is_the_tables(runner):
    """vLLM draws a chain's under Model Runner V2, with more spread than our draws have."""
    report = run_worker("replayed_acceptance", runner)
    for name, one in report.items():
        assert one["lengths"] == [TOKENS] * 4
        chances, depths = expected_tree(shape_of(parse_arms([name])[1]), [ratio_for(4.75)])
        found = one["accepted"] / one["verifications"]
        # The last verification of an answer may be cut.
        assert found == pytest.approx(chances.sum(), abs=0.35 if name == "chain:3" else 0.2), name
        assert 0 < one["accepted"] < one["drafted"]
        assert one["by_depth"][depths.max() - 1] > 0, "the deepest nodes are reached"


@pytest.mark.long
def test_the_command_says_what_it_measures(tmp_path, fresh_process):
    fresh_process["env"] |= {"MSD_CACHE_DIR": str(tmp_path / "cache")}
    command = [
        *(sys.executable, "-m", "vllm_msd.cli.main", "bench", "--shape", "tiny", "--batch", "1"),
        *("--arms", "none", "chain", "--num-prompts", "2", "--max-tokens", "16"),
        *("--output", str(tmp_path / "out")),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANGS, cwd=REPOSITORY, check=False,
        **fresh_process,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    note = "acceptance from a table, cost from the true shape"
    assert note in done.stdout and "not compared" in done.stdout
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["shape"]["note"] == note and found["support"] == {}
    (cell,) = found["cells"]
    assert "identical" not in cell["arms"]["chain"] and cell["arms"]["chain"]["accepted"] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Acceptance from a table, cost from the true shape" in page and "Not compared" in page
