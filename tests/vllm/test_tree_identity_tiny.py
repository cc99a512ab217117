"""Draft trees change no token: constructed pairs, and the same with the plugin broken on purpose.

Each report comes from one process with two engines (see ``tests.common.tree_identity``); the tests
of a report only read it. The drafts are unsure, so that more than first children are accepted.
"""

import pytest

from tests.common import tiny
from tests.common.long import long_but
from tests.common.pair_reports import pair_reports
from tests.common.tree_identity import ALL_CASES
from tests.common.worker import run_worker

# vLLM 0.32 and 0.33 crash under Model Runner V1 on the CPU when a seeded prompt comes in chunks.
V1_CASES = [name for name in ALL_CASES if name != "seeded_samples"]
M_ROPE_CASES = ["mixed_batch", "chunk_inside_image", "prefix_cache", "preemption"]
# Triton's interpreter is slow: here what the runners do differently.
V2_CASES = [
    "mixed_batch", "logprobs", "end_of_context", "settled_prefixes", "constrained_beside_free",
    "seeded_samples",
]  # fmt: skip
RUNS = {
    ("llava", "v1"): V1_CASES,
    ("llava", "v2"): V2_CASES,
    ("qwen2_vl", "v1"): M_ROPE_CASES,
    ("qwen2_5_vl", "v1"): M_ROPE_CASES[:1],
    ("qwen3_vl", "v1"): M_ROPE_CASES[:1],
    ("llava_next", "v1"): M_ROPE_CASES[:1],
    ("llava_onevision", "v1"): M_ROPE_CASES[:1],
    ("qwen2_vl", "v2"): M_ROPE_CASES[:1],
}
SHORT = {("llava", "v1")}
# What is broken in which run, and the case that has to notice it.
MUTATIONS = {
    ("llava", "v1"): {
        "mask": "mixed_batch",
        "position": "mixed_batch",
        "settle": "mixed_batch",
        "acceptance": "mixed_batch",
    },
    ("llava", "v2"): {
        "mask": "mixed_batch",
        "position": "mixed_batch",
        "settle": "mixed_batch",
        "acceptance": "mixed_batch",
        "sampling_position": "seeded_samples",
    },
    ("qwen2_vl", "v1"): {"position": "mixed_batch"},
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Runs a (kind, runner) when it is first asked for."""

    def arguments(kind, runner, pair):
        return {"cases": RUNS[kind, runner], "mutations": MUTATIONS.get((kind, runner))}

    return pair_reports(tmp_path_factory.mktemp("pairs"), "tree", arguments, decoys=2)


@pytest.mark.parametrize(
    ("kind", "runner", "case"),
    long_but(SHORT, [(*run, case) for run, cases in RUNS.items() for case in cases]),
)
def test_same_tokens(reports, kind, runner, case):
    result = reports(kind, runner)["cases"][case]
    assert result["same"], result["first_difference"]
    assert result["accepted"] > 0
    assert result["rejected"] > 0
    assert result["branching"] > 0
    assert result["other_children"] > 0


@pytest.mark.parametrize(("kind", "runner"), long_but(SHORT, RUNS))
def test_cases_saw_what_they_are_for(reports, kind, runner):
    """A preemption case without preemption, say, would prove nothing."""
    report = reports(kind, runner)
    cases = report["cases"]
    assert max(case["deepest"] for case in cases.values()) == 4
    assert report["used_blocks"] == 0
    if "preemption" in cases:
        assert cases["preemption"]["preemptions"] > 0
    if "end_of_context" in cases:
        assert cases["end_of_context"]["reached_the_end"]
        assert len(cases["end_of_context"]["tree_sizes"]) > 3  # cut by the end of the context
    if "cut_trees" in cases:
        assert len(cases["cut_trees"]["tree_sizes"]) > 1
    if "settled_prefixes" in cases:
        assert all(count >= 32 for count in cases["settled_prefixes"]["cached_answer"])


@pytest.mark.parametrize(
    ("kind", "runner", "mutation"),
    long_but(SHORT, [(*run, m) for run, table in MUTATIONS.items() for m in table]),
)
def test_mutations_are_noticed(reports, kind, runner, mutation):
    assert not reports(kind, runner)["mutations"][mutation]["same"]


# By 1 to 6 running requests; by none the draft still reads along. As many rows as fit in a step.
SCHEDULE = [[1, 2, 12], [3, 3, 5], [4, 4, 0], [5, 5, 2], [6, 6, 4]]
SCHEDULED_CASES = ["mixed_batch", "constrained_beside_free", "aborts_and_arrivals"]


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory):
    pair = tiny.build_pair(tmp_path_factory.mktemp("scheduled"), "llava", decoys=2)
    return run_worker(
        "tree",
        "v1",
        kind="llava",
        target=pair.target,
        draft=pair.draft,
        cases=SCHEDULED_CASES,
        mutations={"mask": "mixed_batch", "settle": "mixed_batch"},
        schedule=SCHEDULE,
        requests_at_once=2,
    )


@pytest.mark.parametrize("name", SCHEDULED_CASES)
def test_same_tokens_by_a_schedule(scheduled, name):
    case = scheduled["cases"][name]
    assert case["same"], case["first_difference"]
    assert case["accepted"] > 0 and case["rejected"] > 0
    assert len(case["tree_sizes"]) > 3


def test_a_schedule_cuts_trees_and_not_only_chains(scheduled):
    cases = scheduled["cases"].values()
    assert sum(case["other_children"] for case in cases) > 0
    sizes = {int(size) for case in cases for size in case["tree_sizes"]}
    assert {nodes + 1 for *_, nodes in SCHEDULE} <= sizes


def test_requests_are_drafted_for_in_turn(scheduled):
    """Two at a time: the same tokens, and the very same trees."""
    at_once, in_turn = scheduled["cases"][SCHEDULED_CASES[0]], scheduled["in_turn"]
    for count in ("same", "steps", "drafted", "accepted", "other_children", "tree_sizes"):
        assert in_turn[count] == at_once[count], count


def test_a_broken_step_of_a_schedule_is_noticed(scheduled):
    assert [m["same"] for m in scheduled["mutations"].values()] == [False, False]


@pytest.mark.long
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_random_workload(tmp_path, runner):
    """Random lengths, images, samplings and aborts in a cache that is too small for all.

    Model Runner V2 with asynchronous scheduling, which the other cases do without.
    """
    pair = tiny.build_pair(tmp_path / "pair", "llava", decoys=2)
    report = run_worker(
        "random",
        runner,
        kind="llava",
        target=pair.target,
        draft=pair.draft,
        requests={"v1": 40, "v2": 8}[runner],
        seed=11,
        longest={"v1": 120, "v2": 40}[runner],
        async_scheduling=runner == "v2",
    )
    assert report["scheduler"] == {"v1": "Scheduler", "v2": "AsyncScheduler"}[runner]
    assert report["mismatches"] == []
    assert report["used_blocks"] == 0
    assert report["images"] > 0
    assert report["accepted"] > 0
    assert report["rejected"] > 0
    assert report["other_children"] > 0
    if runner == "v1":  # enough requests for the rare things
        assert report["aborted"] > 0
        assert report["preemptions"] > 0
