"""What a step takes under Model Runner V2: made-up requests, run as real ones, in the worker.

vLLM's own timing of dummy runs (`StepTimingCollector`) leaves sampling out, and a dummy run takes
the draft's long prefill where real steps of trees take the compact one. Here whole steps follow
each other as they do while serving, and the clock stops when the device has done the last.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.request import Request

from vllm_msd.provenance import machine

CONTEXT = 1024  # rows that each made-up request has behind it, where the cache has room for them
WARM_UP, TIMED = 1, 4  # steps
TOKEN = 1  # of prompts whose text does not matter
OUT_OF_MEMORY = math.inf  # in the place of seconds


def machine_of(worker: Any) -> dict[str, Any]:
    """What the worker runs on."""
    return machine()


def time_steps(worker: Any, requests: int, nodes: int) -> float | None:
    """Seconds of a step in which each request has so many nodes verified, and drafts as many.

    Called on every rank at once.

    Returns:
        None where the model's length or the cache leaves no room for such steps, and
        `OUT_OF_MEMORY` where the device has none. Ranks are alike, so it strikes all of them.
    """
    runner = worker.model_runner
    rows = (1 + WARM_UP + TIMED) * (1 + nodes) + runner.vllm_config.num_lookahead_tokens
    context = _context(runner, requests, rows)
    if context < 1:
        return None
    steps = _Steps(worker, requests, nodes, context)
    runner.kv_connector.set_disabled(True)
    try:
        steps.first(context + rows)
        for _ in range(WARM_UP):
            steps.next()
        _wait()
        started = time.perf_counter()
        for _ in range(TIMED):
            steps.next()
        _wait()
        return (time.perf_counter() - started) / TIMED
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    finally:
        steps.finish()
        runner.kv_connector.set_disabled(False)


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _context(runner: Any, requests: int, rows: int) -> int:
    """Rows that each request can have behind ``rows`` more."""
    blocks = (runner.kv_cache_config.num_blocks - 1) // requests  # block 0 is nobody's
    most = min(CONTEXT, runner.max_model_len - rows)
    while most > 0 and sum(_blocks(runner, most + rows)) > blocks:
        most -= 16
    return most


def _blocks(runner: Any, positions: int) -> list[int]:
    """Blocks that a request of so many positions has, by group of layers."""
    groups = runner.kv_cache_config.kv_cache_groups
    return [-(-positions // group.kv_cache_spec.block_size) for group in groups]


class _Steps:
    """Steps of one batch of made-up requests, as the scheduler would order them."""

    def __init__(self, worker: Any, requests: int, nodes: int, context: int) -> None:
        self.worker, self.nodes, self.context = worker, nodes, context
        self.ids = [f"msd-cost-{number}" for number in range(requests)]
        self.computed = context

    def first(self, positions: int) -> None:
        """New requests, all of whose prompt but the last row counts as read."""
        free = iter(range(1, self.worker.model_runner.kv_cache_config.num_blocks))
        counts = _blocks(self.worker.model_runner, positions)
        # A seed of its own, or the sampler would draw one of those that real requests get.
        params = SamplingParams(temperature=0.0, max_tokens=positions, ignore_eos=True, seed=0)
        step = SchedulerOutput.make_empty()
        for req_id in self.ids:
            prompt = [TOKEN] * self.context
            request = Request(req_id, prompt, params, None)
            request.num_computed_tokens = self.context - 1
            blocks = tuple([next(free) for _ in range(count)] for count in counts)
            step.scheduled_new_reqs.append(
                NewRequestData.from_request(request, blocks, prefill_token_ids=prompt)
            )
        self._run(step, 0)

    def next(self) -> None:
        """One token more of each, with as many drafts as there are nodes."""
        step = SchedulerOutput.make_empty()
        cached = CachedRequestData.make_empty()
        cached.req_ids = list(self.ids)
        # As if all drafts were accepted: the device knows how many were.
        cached.num_computed_tokens = [self.computed] * len(self.ids)
        cached.num_output_tokens = [1 + self.computed - self.context] * len(self.ids)
        cached.new_block_ids = [None] * len(self.ids)
        step.scheduled_cached_reqs = cached
        if self.nodes:
            step.scheduled_spec_decode_tokens = {req_id: [-1] * self.nodes for req_id in self.ids}
        self._run(step, self.nodes)
        self.computed += 1 + self.nodes

    def finish(self) -> None:
        """Let the worker forget these requests."""
        step = SchedulerOutput.make_empty()
        step.finished_req_ids = set(self.ids)
        self.worker.execute_model(step)
        _wait()

    def _run(self, step: SchedulerOutput, drafts: int) -> None:
        step.num_scheduled_tokens = dict.fromkeys(self.ids, 1 + drafts)
        step.total_num_scheduled_tokens = len(self.ids) * (1 + drafts)
        step.num_spec_tokens_to_schedule = self.nodes
        self.worker.execute_model(step)
        self.worker.sample_tokens(None)
