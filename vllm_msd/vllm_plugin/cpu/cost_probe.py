"""Finding out what steps cost here, before the first request: made-up requests, run as real ones.

Each point of the table is a few decoding steps of the runner itself, with the draft's own nodes in
them: inputs, attention, sampling and settling included. The table is kept on disk for the next
start.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.logger import init_logger
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_msd.budget import CostTable, choose_shape
from vllm_msd.budget.costs import GREEDY
from vllm_msd.provenance import machine, versions
from vllm_msd.tree import TreeConfig
from vllm_msd.vllm_plugin.cpu.auto_drafter import AutoProposer, Forced
from vllm_msd.vllm_plugin.kept_costs import keep, table_path

if TYPE_CHECKING:
    from vllm_msd.vllm_plugin.cpu.runner import TreeModelRunner

SECONDS = 9.0  # for all shapes
REPEATS = 3
CONTEXT = 64  # rows that each made-up request has behind it
REQUESTS = (1, 4, 16, 64)  # and the most that the engine runs, if that is below the last
# Ways of drawing, see `way_of_drawing`, and how often their steps take turns with greedy ones.
DRAWING = {"drawn": {}, "top-k": {"top_k": 50}, "top-p": {"top_p": 0.9}}
TURNS = 2
DRAWING_SHARE = 0.3  # of the time, at most
TOKEN = 1  # of prompts whose text does not matter

logger = init_logger("vllm.vllm_msd")


def prepare_budget(runner: TreeModelRunner) -> None:
    """Give the runner's drafter its cost table and shape: from disk, else measured now."""
    drafter: AutoProposer = runner.drafter
    tables, origin = {}, "cached"
    for shape in drafter.shapes:
        key = table_key(runner.vllm_config, shape)
        table = CostTable.load(table_path(key), key)
        if table is None:
            origin = "measured"
            table = measure(runner, shape, SECONDS / len(drafter.shapes))
            keep(table, key)
        tables[shape] = table
    drafter.tables = tables
    shape = choose_shape(list(tables.items()), drafter.prior.by_depth)
    drafter.use(shape, tables[shape])
    depths = [f"{n}: {_argmax(drafter.chooser.rates(n, tables[shape]))}" for n in (1, 4, 16)]
    logger.info(
        "MSD drafts what pays: %s. Costs (%s): %s. Depth to begin with, by requests: %s.",
        shape.in_words,
        origin,
        tables[shape].gist(),
        ", ".join(depths),
    )


def _argmax(values: list[float]) -> int:
    return values.index(max(values))


def table_key(vllm_config: Any, shape: TreeConfig) -> dict[str, Any]:
    """What a table holds for: it is not used for anything else."""
    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    scheduler = vllm_config.scheduler_config
    requests = min(scheduler.max_num_seqs, max(REQUESTS))
    return {
        "machine": {**machine(), "preloaded": os.environ.get("LD_PRELOAD", "")},
        "model": str(model.model),
        "draft": str(speculative.model),
        "sizes": hashlib.sha256(
            json.dumps([model.hf_config.to_dict(), speculative.draft_model_config.hf_config
                        .to_dict()], sort_keys=True, default=str).encode()
        ).hexdigest(),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "parallelism": vllm_config.parallel_config.world_size,
        "compiled": str(vllm_config.compilation_config.mode),
        "shape": [shape.num_nodes, shape.depth, shape.top_k],
        # They bound the points of the table; more of either than the points have changes nothing.
        "requests": requests,
        "rows": min(scheduler.max_num_batched_tokens, requests * (1 + shape.num_nodes)),
        "versions": versions(),
    }  # fmt: skip


def measure(runner: TreeModelRunner, shape: TreeConfig, seconds: float) -> CostTable:
    """Time steps with trees of this shape, small ones first, for about so long."""
    started = time.perf_counter()
    until = started + (1 - DRAWING_SHARE) * seconds
    step, prefill, level = [], [], []
    last = (0.0, 1)  # seconds and rows of the largest step so far
    for requests, nodes in _points(runner, shape):
        rows = requests * (1 + nodes)
        expected = (REPEATS + 1) * last[0] * max(rows / last[1], 1)
        if level and time.perf_counter() + expected > until:
            continue
        depth = min(nodes, shape.depth)
        for target, reading, growing in _timed(runner, requests, Forced(shape, depth, nodes)):
            step.append((requests, rows, target))
            if depth:
                prefill.append((rows, reading + growing / depth))
                level.append((requests, growing / depth))
            last = max(last, (target, rows))
            if time.perf_counter() > until:
                break
    drawing = _drawing_costs(runner, shape, step, started + seconds)
    return CostTable(tuple(step), tuple(prefill), tuple(level), tuple(drawing.items()))


def _drawing_costs(
    runner: TreeModelRunner,
    shape: TreeConfig,
    step: Sequence[tuple[int, int, float]],
    until: float,
) -> dict[str, float]:
    """Seconds that a row costs more in a step that draws, by the way of drawing.

    Of the largest of the steps measured that there is time for; empty where there is none.
    """
    runs = (1 + len(DRAWING)) * (REPEATS + 1)
    left = (until - time.perf_counter()) / (2 * runs)  # twice: drawing takes time
    fitting = [(rows, requests) for requests, rows, took in step if requests <= 4 and took < left]
    if not fitting:
        return {}
    rows, requests = max(fitting)
    nodes = rows // requests - 1
    forced = Forced(shape, min(nodes, shape.depth), nodes)
    best: dict[str, float] = {}
    for turn in range(TURNS):
        for way, settings in {GREEDY: {"temperature": 0.0}, **DRAWING}.items():
            if turn and time.perf_counter() > until:
                break
            params = SamplingParams(**{"temperature": 1.0, **settings})
            for seconds, *_ in _timed(runner, requests, forced, params):
                best[way] = min(seconds, best.get(way, seconds))
    greedy = best.pop(GREEDY)
    return {way: max(seconds - greedy, 0.0) / rows for way, seconds in best.items()}


def _points(runner: TreeModelRunner, shape: TreeConfig) -> list[tuple[int, int]]:
    """Requests and nodes of the steps to time, the smallest first."""
    scheduler = runner.vllm_config.scheduler_config
    nodes = sorted({0, min(2, shape.num_nodes), shape.num_nodes // 2, shape.num_nodes})
    most = min(scheduler.max_num_seqs, max(REQUESTS))
    points = [
        (requests, count)
        for requests in sorted({*REQUESTS, most})
        for count in nodes
        if requests <= most
        and requests * (1 + count) <= scheduler.max_num_batched_tokens
        and requests * _blocks(runner, shape) < runner.kv_cache_config.num_blocks
    ]
    return sorted(points, key=lambda point: (point[0] * (1 + point[1]), point))


def _rows_needed(runner: TreeModelRunner, shape: TreeConfig) -> tuple[int, int]:
    """Rows behind a made-up request, and positions it needs in all."""
    ahead = (REPEATS + 1) * (1 + shape.num_nodes) + runner.vllm_config.num_lookahead_tokens
    context = max(1, min(CONTEXT, runner.max_model_len - ahead))
    return context, min(context + ahead, runner.max_model_len)


def _blocks(runner: TreeModelRunner, shape: TreeConfig) -> int:
    _, positions = _rows_needed(runner, shape)
    groups = runner.kv_cache_config.kv_cache_groups
    return sum(-(-positions // group.kv_cache_spec.block_size) for group in groups)


def _timed(
    runner: TreeModelRunner, requests: int, forced: Forced, params: SamplingParams | None = None
) -> Iterator[tuple[float, float, float]]:
    """Seconds of the target, of the draft's reading and of its growing, of a few equal steps.

    ``params``: of all requests; None: greedy.
    """
    params = params or SamplingParams(temperature=0.0)
    drafter: AutoProposer = runner.drafter
    context, positions = _rows_needed(runner, forced.shape)
    ids = [f"msd-cost-{number}" for number in range(requests)]
    drafter.forced = forced
    try:
        tokens = _run(runner, _first_step(runner, forced.shape, ids, context, params))
        computed, said = dict.fromkeys(ids, context), dict.fromkeys(ids, 1)
        for _ in range(REPEATS):
            if max(computed.values()) + 1 + forced.nodes > positions:
                break  # so short is the model's length
            started = time.perf_counter()
            tokens = _run(runner, _next_step(runner, ids, computed, said))
            took = time.perf_counter() - started
            for req_id in ids:
                computed[req_id] += len(tokens[req_id])
                said[req_id] += len(tokens[req_id])
            spent = drafter.spent
            drafting = spent.reading + spent.growing
            yield took - drafting, spent.reading, spent.growing
    finally:
        drafter.forced = None
        done = SchedulerOutput.make_empty()
        done.finished_req_ids = set(ids)
        runner.execute_model(done)


def _run(runner: TreeModelRunner, step: SchedulerOutput) -> dict[str, list[int]]:
    """Run a step as the engine does; each request's tokens."""
    step.total_num_scheduled_tokens = sum(step.num_scheduled_tokens.values())
    step.num_spec_tokens_to_schedule = runner.num_spec_tokens
    runner.execute_model(step)
    output = runner.sample_tokens(None)
    return dict(zip(output.req_ids, output.sampled_token_ids, strict=True))


def _first_step(
    runner: TreeModelRunner,
    shape: TreeConfig,
    ids: list[str],
    context: int,
    params: SamplingParams,
) -> SchedulerOutput:
    """New requests, all of whose prompt but the last row counts as read."""
    step = SchedulerOutput.make_empty()
    _, positions = _rows_needed(runner, shape)
    free = iter(range(1, runner.kv_cache_config.num_blocks))  # block 0 is nobody's
    for req_id in ids:
        blocks = tuple(
            [next(free) for _ in range(-(-positions // group.kv_cache_spec.block_size))]
            for group in runner.kv_cache_config.kv_cache_groups
        )
        step.scheduled_new_reqs.append(
            NewRequestData(
                req_id=req_id,
                prompt_token_ids=[TOKEN] * context,
                mm_features=[],
                sampling_params=params,
                pooling_params=None,
                block_ids=blocks,
                num_computed_tokens=context - 1,
                lora_request=None,
            )
        )
        step.num_scheduled_tokens[req_id] = 1
    return step


def _next_step(
    runner: TreeModelRunner, ids: list[str], computed: dict[str, int], said: dict[str, int]
) -> SchedulerOutput:
    """The requests' next step, with what was drafted for them."""
    step = SchedulerOutput.make_empty()
    drafts = runner.take_draft_token_ids()
    cached = CachedRequestData.make_empty()
    cached.req_ids = list(ids)
    cached.num_computed_tokens = [computed[req_id] for req_id in ids]
    cached.num_output_tokens = [said[req_id] for req_id in ids]
    cached.new_block_ids = [None] * len(ids)
    step.scheduled_cached_reqs = cached
    step.num_scheduled_tokens = dict.fromkeys(ids, 1)
    for req_id, tokens in zip(drafts.req_ids, drafts.draft_token_ids, strict=True):
        if tokens:
            step.scheduled_spec_decode_tokens[req_id] = tokens
            step.num_scheduled_tokens[req_id] += len(tokens)
    return step
