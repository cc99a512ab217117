"""A short soak: 150 requests, 16 at a time, a fifth of them aborted, through draft trees.

`make soak` serves thousands and looks at the memory, which a short run cannot.
"""

import pytest

from tests.common import tiny
from tests.common.worker import run_worker
from tests.long.soak import failures

pytestmark = pytest.mark.long


def test_nothing_differs_and_nothing_is_left_over(tmp_path):
    pair = tiny.build_pair(tmp_path / "pair", "llava", decoys=2)
    report = run_worker(
        "soak",
        "v1",
        kind="llava",
        target=pair.target,
        draft=pair.draft,
        requests=150,
        seed=3,
        longest=60,
    )
    assert report["mismatches"] == []
    assert report["used_blocks"] == 0
    assert min(report["curve"]["free_blocks"]) < 5  # the cache was full
    for name in ("aborted", "images", "preemptions", "accepted", "rejected", "other_children"):
        assert report[name] > 0, name
    assert len(report["curve"]["memory_mib"]) > 100
    assert failures("soak", report, quick=True) == []
