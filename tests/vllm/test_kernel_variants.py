"""An engine launches no variant of our kernels that it had not launched before its first step."""

import pytest

from tests.common.worker import run_worker
from vllm_msd.demo.paths import demo_pair

pytestmark = pytest.mark.long


def test_nothing_is_left_to_compile_while_serving():
    """The kernels themselves, in the interpreter, on the wiring of a GPU."""
    pair = demo_pair()
    found = run_worker(
        "variants", "v2", wiring={"interpreted": True}, target=str(pair.target),
        draft=str(pair.draft),
    )  # fmt: skip
    assert found["late"] == []
    assert found["launched"] == [
        "accept_kernel", "beam_step_kernel", "merge_top_k_kernel", "rerank_kernel",
        "settle_kernel", "top_k_parts_kernel", "tree_attention_kernel",
    ]  # fmt: skip
    assert set(found["launched"]) <= set(found["warmed"])
    assert found["acceptance"]["accepted"] > 0 and found["acceptance"]["rejected"] > 0
