"""Killed and started again: the result is that of an unbroken run (longer in tests/long)."""

import random

import pytest

from tests.common.kills import killed


@pytest.mark.parametrize(
    ("what", "kills"),
    [
        pytest.param("train", 2, marks=pytest.mark.long),
        ("convert", 2),
        ("trim", 2),
        ("regenerate", 10),
    ],
)
def test_a_kill_changes_no_result(what, kills):
    number = random.SystemRandom().randrange(1 << 30)
    print("seed", number)
    found = killed(what, kills, number, timeout=500)
    met = found["met"]
    # A regeneration is killed until it reaches its end, so a kill more may be needed.
    assert found["different"] == 0 and sum(met.values()) - met["not at all"] >= kills
