"""The long runs' thresholds: what `tests/long/soak.py` calls a failure."""

import pytest

from tests.common.soak import growth
from tests.long.soak import failures

RUN = {
    "mismatches": [],
    "used_blocks": 0,
    "aborted": 1,
    "preemptions": 1,
    "accepted": 1,
    "rejected": 1,
    "other_children": 1,
    "scheduler": "AsyncScheduler",
    "memory_growth_mib": 2.0,
    "plain_memory_growth_mib": 1.0,
}
TRIAL = {
    "wrong_rule": "none",
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "prompt": "text",
    "batch": {"accepted": 1, "rejected": 1},
}


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("identity-v1", {"mismatches": [{}]}),
        ("identity-v1", {"used_blocks": 1}),
        ("identity-v2", {"preemptions": 0}),
        ("seeded-v2", {"other_children": 0}),
        ("identity-v2-async", {"scheduler": "Scheduler"}),
        ("soak", {"memory_growth_mib": 80.0}),
    ],
)
def test_a_run_that_misses_something_fails(part, change):
    assert failures(part, RUN) == []
    assert len(failures(part, {**RUN, **change})) == 1


@pytest.mark.parametrize(
    ("rule", "p", "count"), [("none", 0.1, 0), ("none", 1e-9, 1), ("other", 0.1, 1)]
)
def test_draws_fail_by_their_smallest_p(rule, p, count):
    trial = {**TRIAL, "wrong_rule": rule, "positions": [{"p": 0.5}, {"p": p}]}
    assert len(failures("draws-v1", {"trials": [trial]})) == count


def test_growth_compares_the_last_quarter_with_the_second():
    assert growth([0, 900, 100, 101, 150, 150, 103, 104]) == 3.0
