"""Sizes left to the plugin, under Model Runner V1: no token differs, whatever is drafted when.

The report comes from one process with three engines (see ``tests.common.auto_drafting``).
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.common import tiny
from tests.common.worker import run_worker

pytestmark = pytest.mark.long
CASES = ["as measured"] + [
    f"{shape}, {how}"
    for shape in ("chain", "tree")
    for how in ("cheap rows", "dear rows", "by a script")
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("auto")
    pair = tiny.build_pair(root, "llava", decoys=2)
    wrong = root / "wrong"
    wrong.mkdir()
    weights = load_file(Path(pair.draft) / "model.safetensors")
    torch.manual_seed(0)
    weights["fc.weight"] = weights["fc.weight"][torch.randperm(len(weights["fc.weight"]))]
    save_file(weights, wrong / "model.safetensors")
    (wrong / "config.json").write_text((Path(pair.draft) / "config.json").read_text())
    return run_worker("auto", "v1", target=pair.target, draft=pair.draft, wrong_draft=str(wrong))


@pytest.mark.parametrize("name", CASES)
def test_same_tokens(report, name):
    """Greedy, beside penalties, and seeded sampling: those of no speculation."""
    case = report["cases"][name]
    assert case["same"]
    if "dear" not in name:
        assert case["accepted"] > 0 and case["rejected"] > 0


def test_costs_were_measured_and_left_nothing_behind(report):
    assert report["points"] >= 6
    assert report["drawing"].keys() == {"drawn", "top-k", "top-p"}
    assert report["left_over"] == 0 and report["owed_by_finished"] == 0


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_budget_follows_the_costs(report, shape):
    cheap, dear = (report["cases"][f"{shape}, {cost} rows"] for cost in ("cheap", "dear"))
    assert sum(depth >= 3 for depth in cheap["depths"]) > len(cheap["depths"]) / 2
    assert sum(depth == 0 for depth in dear["depths"]) > 0.8 * len(dear["depths"])
    # A chain's few nodes are all worth their cheap rows; of a tree, requests get different shares.
    assert len(cheap["sizes"]) > (1 if shape == "chain" else 3)
    assert cheap["accepted"] > 5 * dear["accepted"]


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_draft_catches_up_with_what_it_left_out(report, shape):
    """After steps without it, the draft says what it says when it has read every step."""
    case = report["cases"][f"{shape}, by a script"]
    assert case["depths"].count(0) > 10
    assert case["drafted_in_both"] > 10
    assert case["drafted_alike"] == case["drafted_in_both"]


def test_a_wrong_draft_is_hardly_asked(report):
    wrong = report["wrong"]
    assert wrong["same"] and wrong["rejected"] > 0
    assert wrong["steps"] > 100
    assert wrong["drafting_steps"] < 0.07 * wrong["steps"]  # what is left are probes
