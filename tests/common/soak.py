"""Thousands of requests through one engine: do answers, cache blocks and memory stay right?

A random workload with aborts is served without speculation and with trees, both in this process.
Along the runs the memory of the process and the free cache blocks are written down. What grows
with trees beyond what grows without them is the plugin's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from tests.common import workload
from tests.common.chain_identity import engine_options
from tests.common.fp32_engine import scheduler_of
from tests.common.tree_identity import served_both_ways

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
    asked = workload.random_requests(requests, seed, longest, abort=0.2)
    curves: dict[str, Curve] = {}

    def watch(name: str, engine: Any) -> Callable[[dict[str, workload.Answer]], None]:
        curves[name] = Curve(engine, requests)
        return curves[name].sample

    report = served_both_ways(
        asked, runner=runner, kind=kind, target=target, draft=draft, seed=seed,
        concurrency=concurrency, options={**engine_options(kind), **OPTIONS},
        show_progress=show_progress, watch=watch,
    )  # fmt: skip
    plain, trees = curves["plain"].values, curves["trees"].values
    return {
        **report,
        "memory_growth_mib": round(growth(trees["memory_mib"]), 1),
        "plain_memory_growth_mib": round(growth(plain["memory_mib"]), 1),
        "curve": trees,
        "plain_curve": plain,
    }


class Curve:
    """Memory and free blocks of one engine's process along ``requests`` requests."""

    def __init__(self, engine: Any, requests: int) -> None:
        self.values: dict[str, list[float]] = {"requests": [], "memory_mib": [], "free_blocks": []}
        self.pool = scheduler_of(engine).kv_cache_manager.block_pool
        self.requests = requests

    def sample(self, answers: dict[str, workload.Answer]) -> None:
        """After a step: write a sample down where one is due."""
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
