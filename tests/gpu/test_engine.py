"""Engines on a CUDA device, decoding in CUDA graphs: the same answers with chains and with trees.

What only shows here: real graphs and streams, a host that waits for the device once an engine
serves (vLLM's VLLM_GPU_SYNC_CHECK ends it), kernels of ours that are compiled only then, and
FLASH_ATTN around the tree kernel. vLLM has to be installed for the device.

Each engine runs in a process of its own, one after another. With ``MSD_GPU_ENGINES=6`` so many run
side by side from the start; each wants a fifth of the device's memory free when it starts.

`python -m tests.common.gpu_engine` without a device rehearses an engine on the CPU.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest

from tests.common.gpu_engine import gpu_engine_answers

pytest.importorskip("vllm", reason="vLLM is not installed")
TREE = {"tree": [5, 4], "spec_tokens": 16}
MOST = (16, 8, 4, 2, 2, 0)  # nodes that pay by costs of the test's own, by requests; 0 beyond


KINDS = {
    "none": {"draft": False},
    "chain": {"spec_tokens": 5},
    "tree": TREE,
    "auto": {"auto": True},
    "moving": {"auto": True, "best": MOST, "seqs": 256, "longest": 96, **TREE},
    "long none": {"draft": False, "longest": 96},
}
AT_ONCE = int(os.environ.get("MSD_GPU_ENGINES", "1"))
ENGINES = ThreadPoolExecutor(AT_ONCE)


@cache
def started(kind, dtype, backend):
    return ENGINES.submit(gpu_engine_answers, dtype=dtype, backend=backend, **KINDS[kind])


def answers(kind, dtype="float32", backend=None):
    return started(kind, dtype, backend).result()


@pytest.fixture(scope="module", autouse=True)
def side_by_side():
    if AT_ONCE > 1:
        for kind in ("none", "chain", "tree", "long none"):  # the others time their steps
            started(kind, "float32", None)


@pytest.mark.parametrize("draft", ["chain", "tree"])
def test_greedy_answers_are_those_of_no_speculation(draft):
    """In float32, where near ties do not fall by rounding."""
    got = answers(draft)
    assert got["graphs"] > 0
    assert got["ids"] == answers("none")["ids"]
    assert got["acceptance"]["accepted"] > 50 and got["acceptance"]["rejected"] > 50


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN"])
def test_either_backend_goes_around_the_trees(backend):
    """In bfloat16 near ties can fall either way, so most answers are the same, not all."""
    got, plain = answers("tree", "bfloat16", backend), answers("none", "bfloat16", backend)
    assert backend in got["backends"]
    same = sum(a == b for a, b in zip(got["ids"], plain["ids"], strict=True))
    assert same >= len(plain["ids"]) * 3 // 4
    # As many tokens a step as in float32, within what few differing answers change.
    exact = answers("tree")["acceptance"]
    share = got["acceptance"]["accepted"] / got["acceptance"]["steps"]
    assert abs(share - exact["accepted"] / exact["steps"]) < 0.5


def test_sizes_left_to_the_plugin_change_no_answer():
    """Whichever it finds worth their time here: none, too."""
    got = answers("auto")
    assert got["graphs"] > 0
    assert got["ids"] == answers("none")["ids"]
    assert {nodes for _, nodes in got["steps"]} <= {0, 1, 2, 3, 5}


def test_trees_follow_the_requests_in_graphs_of_the_engines_own():
    """Up to 256 requests, of which the draft takes not all at once; sizes by the test's costs."""
    got = answers("moving")
    assert got["graphs"] > 100
    assert got["ids"] == answers("long none")["ids"]
    assert got["acceptance"]["accepted"] > 50 and got["acceptance"]["rejected"] > 50
    wanted = dict(enumerate(MOST, 1))
    others = [(n, nodes) for n, nodes in got["steps"] if nodes != wanted.get(n, 0)]
    assert len(others) <= 3 and all(nodes > wanted.get(n, 0) for n, nodes in others)  # probes
    assert {(12, 0), (6, 0), (3, 4)} <= {(n, nodes) for n, nodes in got["steps"]}


@pytest.mark.parametrize(
    ("draft", "sizes"), [("auto", (0, 1, 2, 3, 5)), ("moving", (0, 1, 2, 4, 8, 16))]
)
def test_what_steps_take_is_measured_at_start(draft, sizes):
    """All sizes at few requests at least; a step takes longer with more of them."""
    costs = {(requests, nodes): seconds for requests, nodes, seconds in answers(draft)["costs"]}
    assert {(n, size) for n in (1, 2, 4) for size in sizes} <= set(costs)
    assert 0 < costs[1, 0] < costs[1, sizes[-1]] < 1


def test_no_kernel_of_ours_is_compiled_while_serving():
    found = answers("tree")
    assert any(name.startswith("vllm_msd") for name in found["compiled_at_start"])
    assert [name for name in found["compiled_late"] if name.startswith("vllm_msd")] == []
