"""Trees off costs nothing: a step without trees launches what it does without the code for them.

The code for trees is in place as an engine with trees leaves it: its attention backends stand where
vLLM's stood. Compared are the names of all launches of all steps, under Model Runner V2 on the
wiring of a GPU, of stock vLLM and of a chain; and what stock vLLM launches where the plugin is not
loaded at all. A tree engine's steps are the control.
"""

from functools import cache

import pytest

from tests.common.worker import run_worker
from vllm_msd.demo.paths import demo_pair

pytestmark = pytest.mark.long


@cache
def operations(draft=False, **options):
    pair = demo_pair()
    return run_worker(
        "step_operations",
        "v2",
        target=str(pair.target),
        draft=str(pair.draft) if draft else None,
        **options,
    )


def test_stock_vllm_is_not_touched():
    found = operations(trees_in_place=True)
    assert found["steps"] == operations(plugin=False)["steps"]
    assert len(found["steps"]) > 5 and min(map(len, found["steps"])) > 50
    assert not any(found["ours"])


def test_a_chain_is_not_touched():
    plain, found = operations(draft=True), operations(draft=True, trees_in_place=True)
    assert found["steps"] == plain["steps"]
    names = {name for step in found["steps"] for name in step}
    assert not names & {"place_trees_eager", "draft_prefill_eager", "beam_step_eager"}


def test_trees_launch_little_beside_the_graphs():
    """At most 12 launches a decoding step are ours, outside its graphs; a prompt has no tree."""
    pair = demo_pair()
    report = run_worker(
        "count_launches",
        "v2",
        target=str(pair.target),
        draft=str(pair.draft),
        speculation={"spec_tokens": 16, "tree": [5, 4]},
    )
    assert len(report["steps"]) > 2
    assert report["prompt"]
    assert not {"place_trees_eager", "accept_kernel", "settle_kernel"} & {*report["prompt"]}
    for step in report["steps"]:
        assert len(step["graphs"]) == 3
        assert {"place_trees_eager", "accept_kernel", "settle_kernel"} <= {*step["ours_by_name"]}
        assert step["ours"] <= 12, step
