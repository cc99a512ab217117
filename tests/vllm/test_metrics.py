"""Acceptance counters, vLLM's own and ours beside them, from an engine in a spawned process.

Spawning also proves that the configuration with our draft in it survives pickling.
"""

from collections import Counter
from dataclasses import dataclass

import pytest
from prometheus_client import REGISTRY
from prometheus_client import Counter as PrometheusCounter
from vllm import LLM, SamplingParams
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.reader import get_metrics_snapshot
from vllm.v1.spec_decode.metrics import SpecDecodingProm, SpecDecodingStats

from tests.common import tiny
from vllm_msd.vllm_plugin.metrics import TreeSeries

TOKENS = 4  # speculative tokens
OUTPUT = 48  # generated tokens of each request


@dataclass
class Run:
    """What two requests left behind; ``requests`` are vLLM's own figures of each.

    ``total`` holds vLLM's counters by name without the prefix; ``nodes`` and ``depths`` our series,
    by label.
    """

    total: dict[str, int | list[int]]
    drafted_nodes: int
    nodes: dict[int, int]
    depths: dict[int, int]
    requests: list


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two requests, one with an image."""
    pair = tiny.build_pair(tmp_path_factory.mktemp("pair"), "llava")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        environment.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        environment.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        llm = LLM(
            model=pair.target,
            speculative_config={"method": "msd", "num_speculative_tokens": TOKENS},
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=2,
            kv_cache_memory_bytes=64 << 20,
            limit_mm_per_prompt={"image": 1},
            disable_log_stats=False,
            per_request_spec_decode_metrics="detailed",
        )
    prompts = [tiny.prompt("llava", "{} what", [tiny.image(0)]), tiny.prompt("llava", "hello")]
    outputs = llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    )
    assert all(len(o.outputs[0].token_ids) == OUTPUT for o in outputs)
    found = llm.get_metrics()
    llm.llm_engine.engine_core.shutdown()
    prefix = "vllm:spec_decode_num_"
    return Run(
        total={
            m.name.removeprefix(prefix): getattr(m, "value", getattr(m, "values", None))
            for m in found
            if m.name.startswith(prefix)
        },
        drafted_nodes=next(m.value for m in found if m.name == "vllm:msd_drafted_nodes"),
        nodes=_by_label(found, "vllm:msd_verifications", "nodes"),
        depths=_by_label(found, "vllm:msd_accepted_tokens_per_depth", "depth"),
        requests=[o.outputs[0].spec_decode_metrics for o in outputs],
    )


def _by_label(metrics, name: str, label: str) -> dict[int, int]:
    return {int(m.labels[label]): m.value for m in metrics if m.name == name}


def test_drafts_are_counted(run):
    """Every token but the first of a request comes from a verification: its accepted drafts and
    one more. A request may end inside its last one."""
    assert 0 < run.total["accepted_tokens"] < run.total["draft_tokens"]
    assert run.total["draft_tokens"] <= TOKENS * run.total["drafts"]
    verified = run.total["drafts"] + run.total["accepted_tokens"]
    assert 2 * (OUTPUT - 1) <= verified <= 2 * (OUTPUT - 1 + TOKENS)


def test_acceptance_by_position(run):
    positions = run.total["accepted_tokens_per_pos"]
    assert len(positions) == TOKENS
    assert sum(positions) == run.total["accepted_tokens"]
    assert positions == sorted(positions, reverse=True)


def test_nodes_drafted_and_verified(run):
    assert run.drafted_nodes == TOKENS * run.total["drafts"]
    assert sum(run.nodes.values()) == run.total["drafts"]
    assert sum(size * count for size, count in run.nodes.items()) == run.total["draft_tokens"]
    assert set(run.nodes) == set(range(TOKENS + 1))


def test_acceptance_by_depth(run):
    assert list(run.depths.values()) == run.total["accepted_tokens_per_pos"]
    assert list(run.depths) == [1, 2, 3, 4]


def test_figures_of_each_request_add_up_to_the_series(run):
    """What each request got is vLLM's own; our series are its sum."""
    assert len(run.requests) == 2 and all(run.requests)
    sizes = Counter(size for r in run.requests for size in r.per_step_drafted)
    assert sizes == Counter({size: count for size, count in run.nodes.items() if count})
    lengths = [length for r in run.requests for length in r.per_step_accepted]
    by_depth = {depth: sum(length >= depth for length in lengths) for depth in run.depths}
    assert by_depth == run.depths


def test_trees_of_different_sizes_in_one_step():
    unregister_vllm_metrics()
    series = TreeSeries(PrometheusCounter, TOKENS, 2, ["engine"], {0: ["0"], 1: ["1"]})
    stats = SpecDecodingStats.new(TOKENS)
    for nodes, accepted in ((4, 2), (1, 1), (4, 0), (3, 2), (0, 0)):
        stats.observe_draft(nodes, accepted)
    series.observe(stats, 1)
    series.observe(stats, 1)
    found = [m for m in get_metrics_snapshot() if m.labels["engine"] == "1"]
    assert _by_label(found, "vllm:msd_verifications", "nodes") == {0: 2, 1: 2, 2: 0, 3: 2, 4: 4}
    assert _by_label(found, "vllm:msd_accepted_tokens_per_depth", "depth") == {1: 6, 2: 4}
    assert [m.value for m in found if m.name == "vllm:msd_drafted_nodes"] == [2 * 5 * TOKENS]


def test_sizes_that_vary_have_no_series_of_drafted_nodes():
    unregister_vllm_metrics()
    series = TreeSeries(PrometheusCounter, TOKENS, 4, ["engine"], {0: ["0"]}, is_fixed=False)
    stats = SpecDecodingStats.new(TOKENS)
    stats.observe_draft(3, 2)
    series.observe(stats, 0)
    names = {m.name for m in get_metrics_snapshot()}
    assert "vllm:msd_drafted_nodes" not in names and "vllm:msd_verifications" in names


def test_other_engines_have_no_series_of_trees():
    unregister_vllm_metrics()
    SpecDecodingProm(None, ["model_name"], {0: ["a"]})
    assert not [m.name for m in REGISTRY.collect() if m.name.startswith("vllm:msd")]
