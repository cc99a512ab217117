"""An engine launches no variant of our kernels that it had not launched before its first step."""

import pytest

from tests.common import tiny
from tests.common.worker import run_worker

pytestmark = pytest.mark.long


def test_nothing_is_left_to_compile_while_serving(tmp_path):
    """The kernels themselves, in the interpreter, on the wiring of a GPU."""
    kind = "qwen3_vl"  # heads of 64, which the tree kernel takes
    pair = tiny.build_pair(tmp_path, kind, decoys=2)
    found = run_worker(
        "variants", "v2", wiring={"interpreted": True}, kind=kind, target=str(pair.target),
        draft=str(pair.draft),
    )  # fmt: skip
    assert found["late"] == []
    assert found["launched"] == [
        "accept_kernel", "beam_step_kernel", "draft_prefill_kernel", "merge_top_k_kernel",
        "place_trees_kernel", "rerank_kernel", "settle_kernel", "top_k_parts_kernel",
        "tree_attention_kernel",
    ]  # fmt: skip
    assert set(found["launched"]) <= set(found["warmed"])
    assert found["acceptance"]["accepted"] > 0 and found["acceptance"]["rejected"] > 0
