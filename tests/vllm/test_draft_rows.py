"""What the draft computes inside vLLM equals ``vllm_msd.draft`` on the same sequences.

fp32 throughout. The target's side goes through Hugging Face's own implementation, so differences
are those of two fp32 implementations of a few layers; a wrong row is off by 0.1 and more.
"""

import pytest

from tests.common.long import long_but
from tests.common.pair_reports import pair_reports

TOLERANCE = 2e-3
RUNS = {
    ("llava", "v1"): ["mask", "chunk_end"],
    ("qwen2_vl", "v1"): ["positions"],
    ("qwen2_5_vl", "v1"): [],
    ("qwen3_vl", "v1"): [],
    ("llava_next", "v1"): [],
    ("llava_onevision", "v1"): [],
    ("llava", "v2"): [],
    ("qwen2_vl", "v2"): [],
}
SHORT = {("qwen2_vl", "v1")}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Runs a (kind, runner) with its faults when it is first asked for."""

    def faults(kind, runner, pair):
        return {"faults": RUNS[kind, runner]}

    return pair_reports(tmp_path_factory.mktemp("pairs"), "draft_rows", faults)


@pytest.mark.parametrize(("kind", "runner"), long_but(SHORT, RUNS))
def test_rows_and_chains_agree(reports, kind, runner):
    report = reports(kind, runner)
    assert report["missing"] == 0, report
    assert report["rows"] > 300
    assert report["visual_rows"] > 50
    assert report["cached_tokens"] >= 32
    assert report["wrong_branch"] == 0, report
    assert max(report["largest"].values()) < TOLERANCE, report
    assert report["drafts"] > 30
    assert report["wrong_drafts"] == 0, report


@pytest.mark.parametrize(
    ("kind", "runner", "fault"),
    long_but(SHORT, [(*run, fault) for run, faults in RUNS.items() for fault in faults]),
)
def test_faults_are_found(reports, kind, runner, fault):
    """The negative control: the mask ignored, and each mend of Model Runner V1 taken away."""
    broken = reports(kind, runner)["faults"][fault]
    assert broken["missing"] or broken["largest"]["output"] > 10 * TOLERANCE, broken


# Trees ----------------------------------------------------------------------------------------

TREE = [12, 4, 3]
# Where rows move along accepted paths; under V2 in steps of trees alone, and in all others.
GATHERS = {"v1": ["draft_gather"], "v2": ["draft_gather", "draft_move"]}
TREE_RUNS = [("llava", "v1"), ("qwen2_vl", "v1"), ("llava", "v2")]


@pytest.fixture(scope="module")
def tree_reports(tmp_path_factory):
    """Runs a (kind, runner) with trees, and again without the gather, when first asked for."""

    def faults(kind, runner, pair):
        return {"faults": GATHERS[runner], "tree": TREE}

    return pair_reports(tmp_path_factory.mktemp("tree_pairs"), "draft_rows", faults, decoys=2)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "runner"), TREE_RUNS)
def test_gathered_rows_are_those_of_a_chain(tree_reports, kind, runner):
    """Along accepted paths the draft reads what it reads with chains, and grows the right trees."""
    report = tree_reports(kind, runner)
    assert report["missing"] == 0, report
    assert report["wrong_branch"] == 0, report
    assert max(report["largest"].values()) < TOLERANCE, report
    assert report["drafts"] > 30
    assert report["wrong_drafts"] == 0, report
    same = dict(report["from_chains"])
    assert same.pop("rows") > 200
    assert max(same.values()) < TOLERANCE, report


@pytest.mark.long
@pytest.mark.parametrize(("kind", "runner"), TREE_RUNS)
def test_a_missing_gather_is_found(tree_reports, kind, runner):
    """It changes no output, only what the draft reads."""
    for fault in GATHERS[runner]:
        broken = tree_reports(kind, runner)["faults"][fault]
        assert broken["missing"] or broken["largest"]["output"] > 10 * TOLERANCE, (fault, broken)
