"""Sizes left to the plugin under Model Runner V2: costs of a test's own, and what steps drafted."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.common.fp32_engine import scheduler_of


def draft_of_trees(draft: str, folder: Path, nodes: int, depth: int, top_k: int) -> str:
    """The same draft in a folder of its own, as one that prefers trees."""
    config = json.loads((Path(draft) / "config.json").read_text())
    sizes = {"num_speculative_tokens": nodes, "tree_depth": depth, "tree_top_k": top_k}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | sizes))
    (folder / "model.safetensors").symlink_to(Path(draft) / "model.safetensors")
    return str(folder)


@contextmanager
def left_to_the_plugin(best: list[int], measured: bool = False) -> Iterator[list[Any]]:
    """Engines opened inside find that nodes cost little up to some number, and much beyond it.

    Args:
        best: that number for 1, 2, ... requests, falling; each one a size to choose from.
        measured: measure what steps cost nevertheless; the points go to the list.
    """
    from vllm_msd.budget import SizeCosts
    from vllm_msd.vllm_plugin import scheduled_sizes

    measure, points = scheduled_sizes.measure, []

    def costs(executor: Any, vllm_config: Any) -> SizeCosts:
        if measured:
            points.extend(measure(executor, vllm_config).points)
        sizes = scheduled_sizes.scheduled_sizes(vllm_config)
        assert set(best) <= set(sizes), (best, sizes)
        return SizeCosts.of(
            (requests, nodes, 1.0 + 0.05 * (nodes > 0) if nodes <= pays else 10.0)
            for requests, pays in enumerate(best, 1)
            for nodes in sizes
        )

    with (
        tempfile.TemporaryDirectory() as root,
        mock.patch.dict(os.environ, {"VLLM_CACHE_ROOT": root}),
        mock.patch.object(scheduled_sizes, "measure", costs),
    ):
        yield points


@contextmanager
def steps_of(engine: Any) -> Iterator[list[tuple[int, int]]]:
    """Requests of each step inside, and how many nodes it drafts for each of them."""
    scheduler, found = scheduler_of(engine), []
    schedule = scheduler.schedule

    def noted(*args: Any) -> Any:
        output = schedule(*args)
        if output.num_scheduled_tokens:
            found.append((len(output.num_scheduled_tokens), output.num_spec_tokens_to_schedule))
        return output

    with mock.patch.object(scheduler, "schedule", noted):
        yield found


def time_some_steps(engine: Any, requests: int, nodes: list[int]) -> list[float]:
    """What steps of so many made-up requests take in an engine, by how many nodes they verify.

    Raises:
        AssertionError: they left something behind.
    """
    from vllm_msd.vllm_plugin.gpu.step_costs import time_steps

    executor = engine.llm_engine.model_executor
    runner = executor.driver_worker.worker.model_runner
    before = dict(runner.req_states.req_id_to_index)
    times = [executor.collective_rpc(time_steps, args=(requests, n))[0] for n in nodes]
    assert runner.req_states.req_id_to_index == before
    return times
