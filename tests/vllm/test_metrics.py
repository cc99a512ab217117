"""Acceptance counters, vLLM's own and ours beside them, from an engine in a spawned process.

Spawning also proves that the configuration with our draft in it survives pickling.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client import REGISTRY
from prometheus_client import Counter as PrometheusCounter
from vllm import LLM, SamplingParams
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.reader import get_metrics_snapshot
from vllm.v1.spec_decode.metrics import SpecDecodingProm, SpecDecodingStats

from tests.common import tiny
from tests.common.server import start_server
from tests.common.worker import HANGS, INTERPRETER
from vllm_msd.vllm_plugin.drafted_nodes import (
    FROM_WORKER,
    drafted_in,
    note_scheduled,
    wrap_make_stats,
    wrap_update_draft_token_ids,
)
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


class Scheduler:
    """vLLM's, as far as it matters: makes a step's figures of what it has seen verified."""

    def __init__(self, top_k: int, v2: bool) -> None:
        draft = SimpleNamespace(
            msd_draft={}, msd_auto=[], msd_tree_depth=3 if top_k > 1 else 8, msd_tree_top_k=top_k
        )
        self.use_v2_model_runner = v2
        self.vllm_config = SimpleNamespace(
            speculative_config=SimpleNamespace(
                num_speculative_tokens=8,
                num_speculative_tokens_per_batch_size=[[1, 1, 8], [2, 4, 2]],
                draft_model_config=SimpleNamespace(hf_config=draft),
            )
        )
        self.sizes: list[int] = []

    def figures(self) -> SpecDecodingStats | None:
        stats = None
        if self.sizes:
            stats = SpecDecodingStats.new(8)
            for size in self.sizes:
                stats.observe_draft(size, 0)
        result = SimpleNamespace(spec_decoding_stats=stats)
        return wrap_make_stats(lambda _: result)(self).spec_decoding_stats


def test_what_a_worker_drafted_comes_with_the_next_figures():
    scheduler = Scheduler(2, v2=False)
    update = wrap_update_draft_token_ids(lambda *_: None)
    update(scheduler, SimpleNamespace(draft_token_ids=[[], []], **{FROM_WORKER: 12}))
    assert scheduler.figures() is None
    update(scheduler, SimpleNamespace(draft_token_ids=[[5, 6], [7]], **{FROM_WORKER: 12}))
    scheduler.sizes = [2, 1]
    stats = scheduler.figures()
    assert drafted_in(stats) == 24 and stats.num_draft_tokens == 3
    update(scheduler, SimpleNamespace(draft_token_ids=[[5, 6], [7]]))  # of a chain: as it is
    stats = scheduler.figures()
    assert drafted_in(stats) == 3

    unregister_vllm_metrics()
    series = TreeSeries(PrometheusCounter, 8, 3, ["engine"], {0: ["0"]}, is_fixed=False)
    series.observe(stats, 0)
    found = get_metrics_snapshot()
    assert [m.value for m in found if m.name == "vllm:msd_drafted_nodes"] == [3]
    sizes = _by_label(found, "vllm:msd_verifications", "nodes")
    assert sizes == {n: int(n in (1, 2)) for n in range(9)}


@pytest.mark.parametrize(("top_k", "expected"), [(1, 2 + 8), (2, 6 + 8)])
def test_model_runner_v2_drafts_what_the_scheduler_wants(top_k, expected):
    """Two nodes of a tree need two levels, which propose six."""
    scheduler = Scheduler(top_k, v2=True)
    for wanted, verified in ((2, {}), (0, {"a": [1, 2]}), (8, {}), (8, {"a": [1]})):
        output = SimpleNamespace(
            num_scheduled_tokens={"a": 1},
            num_spec_tokens_to_schedule=wanted,
            scheduled_spec_decode_tokens=verified,
        )
        note_scheduled(scheduler, output)
    scheduler.sizes = [2, 1]
    assert drafted_in(scheduler.figures()) == expected
    assert drafted_in(scheduler.figures()) == 0


def test_a_server_under_model_runner_v2_tells_what_it_drafted(tmp_path, fresh_process):
    """One request, in steps of 4 drafted tokens; two would have 2 each."""
    pair = tiny.build_pair(tmp_path, "llava")
    config = {"method": "msd", "model": str(pair.draft), "num_speculative_tokens": TOKENS}
    config["num_speculative_tokens_per_batch_size"] = [[1, 1, TOKENS], [2, 8, 2]]
    environment = fresh_process["env"] | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": f"{INTERPRETER}:{fresh_process['env'].get('PYTHONPATH', '')}",
    }
    options = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20)]
    options += ["--served-model-name", "tiny", "--speculative-config", json.dumps(config)]
    command = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(pair.target))
    cores = os.sched_getaffinity(0)
    server = start_server(tmp_path, environment, cores, options, command)
    try:
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 24, "temperature": 0}
        reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=HANGS)
        assert reply.status_code == 200, reply.text
        metrics = server.metrics()
    finally:
        server.stop()
    verified = metrics["vllm:spec_decode_num_draft_tokens_total"]
    verifications = metrics["vllm:spec_decode_num_drafts_total"]
    assert 0 < verified <= metrics["vllm:msd_drafted_nodes_total"] == TOKENS * verifications


def test_other_engines_have_no_series_of_trees():
    unregister_vllm_metrics()
    SpecDecodingProm(None, ["model_name"], {0: ["a"]})
    assert not [m.name for m in REGISTRY.collect() if m.name.startswith("vllm:msd")]
