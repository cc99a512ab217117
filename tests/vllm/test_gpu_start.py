"""Engines for a CUDA device start, as vLLM's GPU worker builds them, kernels left out.

What the engines on emulated graphs cannot show: vLLM starts those with the CPU's worker, which has
no memory profile, nor one of the graphs' memory: nothing is drafted before the KV cache is there.
"""

import json
import subprocess
import sys

import pytest

from tests.common.worker import REPOSITORY

pytestmark = pytest.mark.long
TREE = {"spec_tokens": 16, "tree": [5, 4]}
ENGINES = {
    "none": {},
    "chain": {"spec_tokens": 5},
    "tree": TREE,
    "auto chain": {"spec_tokens": 5, "auto": True},
    "auto tree": {**TREE, "auto": True},
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    report = tmp_path_factory.mktemp("start") / "report.json"
    order = json.dumps([*ENGINES.values()])
    done = subprocess.run(
        [sys.executable, "-m", "tests.common.pretended_gpu", order, str(report)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return dict(zip(ENGINES, json.loads(report.read_text()), strict=True))


@pytest.mark.parametrize("kind", ENGINES)
def test_the_gpu_worker_starts(reports, kind):
    """In the order of a device: profile, graphs over a small cache, the cache, graphs again."""
    report = reports[kind]
    assert report["worker"] == "Worker"
    assert report["steps"] == [
        "profile_run", "profile_cudagraph_memory", "initialize_kv_cache", "capture_model",
        "initialize_kv_cache", "capture_model",
    ]  # fmt: skip
    managers = {"target"} | ({"prefill", "decode"} if kind != "none" else set())
    managers |= {"compact"} if "tree" in kind else set()
    assert set(report["graphs"]) == managers and min(report["graphs"].values()) > 0


@pytest.mark.parametrize("kind", ENGINES)
def test_caches_of_the_profile_are_gone_before_the_real_ones_come(reports, kind):
    assert reports[kind]["caches_left"] == [0, 0]


@pytest.mark.parametrize("kind", ["tree", "auto tree"])
def test_our_kernels_are_launched_on_the_way(reports, kind):
    kernels = {"tree_attention", "beam_step", "rerank", "place_trees", "draft_prefill", "accept"}
    assert kernels <= set(reports[kind]["launched"])


@pytest.mark.parametrize("kind", ["auto chain", "auto tree"])
def test_sizes_that_move_have_more_graphs(reports, kind):
    fixed = reports[kind.removeprefix("auto ")]
    assert reports[kind]["graphs"]["target"] > fixed["graphs"]["target"]
