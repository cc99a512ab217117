"""Thousands of requests through one engine: do answers, cache blocks and memory stay right?

A random workload with aborts is served without speculation and with trees, both in this process.
Along the runs the memory of the process and the free cache blocks are written down. What grows
with trees beyond what grows without them is the plugin's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from tests.common import workload
from tests.common.chain_identity import Run, engine_options, require_runner
from tests.common.fp32_engine import (
    acceptance,
    counted,
    pictures_kept_for_resumption,
    running_engine,
    scheduler_of,
)
from tests.common.tree_identity import DEPTH, NODES, TOP_K
from tests.common.tree_mutations import watched_acceptance

# Sixteen requests fill the batch; the longest of them do not all fit into the cache.
OPTIONS = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "num_gpu_blocks_override": 57}
SAMPLES = 200  # over the whole run


def soak(
    *,
    runner: str,
    kind: str,
    target: str,
    draft: str,
    requests: int,
    seed: int,
    longest: int,
    concurrency: int = 16,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Serve ``requests`` of `workload.random_requests` twice; what differs, and what is left over.

    Under ``curve`` stand, for each sample, how many requests were done, the process's resident
    memory in MiB and the free cache blocks; under ``plain_curve`` the same without speculation.
    ``memory_growth_mib`` is the median memory of the last quarter of the requests less that of the
    second, ``plain_memory_growth_mib`` that without speculation.
    """
    started = time.perf_counter()
    asked = workload.random_requests(requests, seed, longest, abort=0.2)
    options = {**engine_options(kind), **OPTIONS}
    with (
        pictures_kept_for_resumption(),
        running_engine(target, None, **options) as plain,
        workload.progress_bar("no speculation", requests, show_progress) as show,
    ):
        require_runner(plain, runner)
        plain_curve = Curve(plain, requests, show)
        expected = workload.serve(plain, kind, asked, concurrency, seed, plain_curve.sample)

    with (
        pictures_kept_for_resumption(),
        running_engine(target, draft, NODES, tree=(DEPTH, TOP_K), **options) as engine,
        watched_acceptance(runner) as seen,
        workload.progress_bar("trees", requests, show_progress) as show,
    ):
        require_runner(engine, runner)
        curve = Curve(engine, requests, show)
        got = workload.serve(engine, kind, asked, concurrency, seed, curve.sample)
        return {
            "runner": runner,
            "kind": kind,
            "requests": requests,
            "concurrency": concurrency,
            "aborted": sum(answer.aborted for answer in got.values()),
            "images": sum(len(request.images) for request in asked),
            "tokens": sum(len(ids) for a in got.values() for ids, *_ in a.samples),
            "mismatches": workload.mismatches(asked, expected, got),
            "preemptions": Run(engine, kind, {}).metric("vllm:num_preemptions"),
            "used_blocks": workload.used_blocks(engine),
            "memory_growth_mib": round(growth(curve.values["memory_mib"]), 1),
            "plain_memory_growth_mib": round(growth(plain_curve.values["memory_mib"]), 1),
            **counted(acceptance(engine)),
            **seen.report(),
            "curve": curve.values,
            "plain_curve": plain_curve.values,
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time(), 1),
        }


class Curve:
    """Memory and free blocks of one engine's process along ``requests`` requests."""

    def __init__(
        self, engine: Any, requests: int, show: Callable[[dict[str, workload.Answer]], None]
    ) -> None:
        self.values: dict[str, list[float]] = {"requests": [], "memory_mib": [], "free_blocks": []}
        self.pool = scheduler_of(engine).kv_cache_manager.block_pool
        self.requests, self.show = requests, show

    def sample(self, answers: dict[str, workload.Answer]) -> None:
        """After a step: show progress, and write a sample down where one is due."""
        self.show(answers)
        values = self.values
        if len(answers) >= len(values["requests"]) * self.requests / SAMPLES:
            values["requests"].append(len(answers))
            values["memory_mib"].append(round(resident_memory() / 2**20, 1))
            values["free_blocks"].append(self.pool.get_num_free_blocks())


def resident_memory() -> int:
    """Bytes of this process that are in memory (Linux)."""
    import psutil

    return psutil.Process().memory_info().rss


def growth(values: list[float]) -> float:
    """The median of the last quarter of ``values`` less that of the second."""
    quarter = len(values) // 4
    return median(values[-quarter:]) - median(values[quarter : 2 * quarter])


def draw_curves(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Plot memory and free blocks over the requests that were done, a line per engine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    memory, blocks = figure.subplots(2, 1, sharex=True)
    for name, curve in curves.items():
        memory.plot(curve["requests"], curve["memory_mib"], label=name)
        blocks.plot(curve["requests"], curve["free_blocks"], linewidth=0.8)
    memory.set_ylim(bottom=0)
    memory.legend(loc="lower right")
    memory.set_ylabel("resident memory, MiB")
    blocks.set_ylim(bottom=0)
    blocks.set_ylabel("free cache blocks")
    blocks.set_xlabel("requests done")
    figure.savefig(path, dpi=100)
