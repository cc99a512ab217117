"""The budget rule with the cost tables of GPUs, by arithmetic."""

import itertools
import json
from pathlib import Path

import pytest

from benchmarks.budget import FIXED, MODELS, TREE, ratio_for, rows
from vllm_msd.budget import expected_tree
from vllm_msd.errors import MSDError
from vllm_msd.roofline.budget_costs import BATCHES
from vllm_msd.roofline.shapes import DEVICES

RESULT = Path(__file__).parents[2] / "benchmarks" / "predictions" / "budget.json"


@pytest.fixture(scope="module")
def ratio():
    return ratio_for(4.75)


def test_acceptance_is_what_was_asked_for(ratio):
    assert 1 + expected_tree(TREE, [ratio])[0].sum() == pytest.approx(4.75, abs=1e-6)
    with pytest.raises(MSDError, match="more than 1 and less than 7"):
        ratio_for(7.0)


@pytest.mark.parametrize(("model", "device"), itertools.product(MODELS, DEVICES))
def test_never_slower_than_none_or_a_fixed_size(ratio, model, device):
    found = rows(model, device, ratio, 1000, hidden=False)
    assert [row["batch"] for row in found] == list(BATCHES)
    for row in found:
        assert row["auto"] >= 1.0
        assert row["auto"] >= 0.98 * max(row[name] for name in FIXED)
    nodes = [row["nodes"] for row in found]
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(nodes))
    assert nodes[0] > 20 and nodes[-1] < 5
    assert min(row["tree 60"] for row in found) < 0.8  # a fixed size would be


@pytest.mark.parametrize(("model", "device"), itertools.product(MODELS, DEVICES))
def test_a_schedule_makes_a_fixed_size_bearable(ratio, model, device):
    """As fast as that size or no speculation, whichever is faster; the draft's reading counts."""
    for row in rows(model, device, ratio, 1000, hidden=False):
        for name in FIXED:
            speed, nodes = row["schedule"][name]
            # A size stays where it is within 2 %, and steps without drafts are not free.
            assert speed >= 0.98 * max(row[name], 0.94)
            assert 0 <= nodes <= FIXED[name].num_nodes
            assert speed <= 1.02 * row["auto"]
    assert row["schedule"]["tree 60"][0] > 2.5 * row["tree 60"]


def test_committed_figures_are_those_of_the_rule(ratio):
    committed = json.loads(RESULT.read_text())
    found = [
        row
        for device in DEVICES
        for model in MODELS
        for hidden in (True, False)
        for row in rows(model, device, ratio, 1000, hidden)
    ]
    assert committed["rows"] == found
    assert committed["note"] == "arithmetic, not measured"
