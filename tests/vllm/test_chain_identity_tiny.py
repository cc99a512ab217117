"""Chain drafting changes no token: constructed pairs of several targets, on both runners.

Each report comes from one process with two engines (see ``tests.common.chain_identity``); the tests
of a report only read it. LLaVA runs every case. The Qwen targets run what M-RoPE has a part in. Of
other families, ``test_trained_drafts`` has the cases under Model Runner V1.
"""

import pytest

from tests.common import tiny
from tests.common.chain_identity import CASES
from tests.common.long import long_but
from tests.common.pair_reports import pair_reports
from tests.common.worker import run_worker

# Drafting always from the first token on, so that no case can pass by not speculating.
M_ROPE_CASES = ["mixed_batch", "chunk_inside_image", "prefix_cache", "preemption"]
RUNS = {
    ("llava", "v1"): list(CASES),
    ("llava", "v2"): list(CASES),
    ("qwen2_vl", "v1"): M_ROPE_CASES,
    ("qwen2_5_vl", "v1"): M_ROPE_CASES,
    ("qwen2_vl", "v2"): M_ROPE_CASES[:2],
    ("qwen2_5_vl", "v2"): M_ROPE_CASES[1:2],
    ("qwen3_vl", "v2"): M_ROPE_CASES[1:2],
}
SHORT = {("llava", "v1")}
# Greedy choices of these follow no free walk, so a draft need not be right (or wrong) in them.
CONSTRAINED = {"structured_output", "penalties"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Runs a (kind, runner) when it is first asked for."""

    def arguments(kind, runner, pair):
        # The published layout for one of them: it is read without conversion.
        draft = pair.published if kind == "qwen2_5_vl" else pair.draft
        return {"draft": draft, "cases": RUNS[kind, runner]}

    return pair_reports(tmp_path_factory.mktemp("pairs"), "chain", arguments)


@pytest.mark.parametrize(
    ("kind", "runner", "case"),
    long_but(SHORT, [(*run, case) for run, cases in RUNS.items() for case in cases]),
)
def test_same_tokens(reports, kind, runner, case):
    result = reports(kind, runner)["cases"][case]
    assert result["same"], result["first_difference"]
    assert result["drafted"] > 0
    if case not in CONSTRAINED:
        assert result["accepted"] > 0
        assert result["rejected"] > 0


@pytest.mark.long
def test_two_tensor_parallel_ranks(reports, tmp_path):
    """Two ranks on this CPU against one without speculation; drafts are accepted as on one."""
    pair = tiny.build_pair(tmp_path / "pair", "llava")
    report = run_worker(
        "chain",
        "v1",
        kind="llava",
        target=pair.target,
        draft=pair.draft,
        cases=["mixed_batch", "several_samples"],
        tensor_parallel_size=2,
    )
    for name, case in report["cases"].items():
        assert case["same"], f"{name}: {case['first_difference']}"
    one, two = reports("llava", "v1")["cases"]["mixed_batch"], report["cases"]["mixed_batch"]
    assert (two["accepted"], two["rejected"]) == (one["accepted"], one["rejected"])


@pytest.mark.parametrize(("kind", "runner"), long_but(SHORT, RUNS))
def test_cases_saw_what_they_are_for(reports, kind, runner):
    """A preemption case without preemption, say, would prove nothing."""
    report = reports(kind, runner)
    cases = report["cases"]
    assert cases["chunk_inside_image"]["cut_inside_image"]
    if "preemption" in cases:
        assert cases["preemption"]["preemptions"] > 0
    if "end_of_context" in cases:
        assert cases["end_of_context"]["reached_the_end"]
    if "prefix_cache" in cases:
        assert cases["prefix_cache"]["repeated"]
        *repeated, other_picture = cases["prefix_cache"]["cached_tokens"]
        assert all(count >= 32 for count in repeated)
        assert other_picture == 0
    # vLLM's own counters, through get_metrics().
    total = report["total"]
    assert total["drafted"] == total["accepted"] + total["rejected"]
    assert total["accepted"] > 5
    assert total["rejected"] > 5


@pytest.mark.long
def test_both_runners_accept_alike(reports):
    """The runners feed the draft the same rows, so they draft and accept the same tokens."""
    v1, v2 = (reports("llava", runner)["cases"]["mixed_batch"] for runner in ("v1", "v2"))
    assert (v1["accepted"], v1["drafted"]) == (v2["accepted"], v2["drafted"])
