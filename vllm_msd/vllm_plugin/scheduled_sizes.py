"""Sizes left to the plugin under Model Runner V2: a schedule of drafted tokens that moves.

vLLM's scheduler looks a step's number of drafted tokens up by its number of requests
(``num_speculative_tokens_per_batch_size``), and its CUDA graphs are there for the numbers in that
schedule. Here the scheduler gets another lookup before each step, of the same numbers. All ranks
follow it, as they do a schedule.

What steps cost is measured once the workers have captured their graphs, from the engine's process,
so that all ranks run the same steps; rank 0's times count. The table is kept on disk.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from vllm import envs
from vllm.logger import init_logger

from vllm_msd.budget import AcceptancePrior, SizeCosts, SizeSchedule
from vllm_msd.provenance import versions
from vllm_msd.vllm_plugin.configuration.tree_settings import (
    is_msd_config,
    scheduled_sizes,
    tree_config,
)
from vllm_msd.vllm_plugin.drafted_nodes import nodes_drafted
from vllm_msd.vllm_plugin.kept_costs import keep, table_path
from vllm_msd.vllm_plugin.tally import Tally
from vllm_msd.vllm_plugin.trees.constrained import needs_chain

SECONDS = 8.0  # of measuring
UNTIMED = "MSD: the sizes are the draft's own. No steps were timed here."
FALLEN_BACK = (
    "MSD: the sizes are the draft's own, as vLLM takes Model Runner V1 here. If it warned of "
    "dynamic speculative decoding and took PIECEWISE CUDA graphs, that was for sizes left to the "
    "plugin: give num_speculative_tokens for full graphs."
)
_SIZES = "msd_sizes"  # where a scheduler keeps its `ScheduledSizes`, or None

logger = init_logger("vllm.vllm_msd")


class ScheduledSizes:
    """A scheduler's sizes. ``rule``: decides them."""

    def __init__(self, rule: SizeSchedule, vllm_config: Any) -> None:
        self.rule, self._config = rule, vllm_config
        self._trees = not tree_config(vllm_config).is_chain
        self._tally = Tally(logger.info, float(envs.VLLM_LOG_STATS_INTERVAL))

    def scheduled(self, output: Any) -> None:
        """Take note of a step that has been scheduled."""
        requests = len(output.num_scheduled_tokens)
        if requests:
            drafted = output.num_spec_tokens_to_schedule
            self.rule.scheduled(requests, drafted)
            self._tally.add(nodes_drafted(self._config, drafted), [drafted] * requests)

    def verified(self, request: Any, drafts: int, accepted: int) -> None:
        """Take note of a request's verification.

        Where trees are drafted, a request that needs a chain says nothing about them.
        """
        if not (self._trees and needs_chain(request.sampling_params)):
            self.rule.observe(drafts, accepted)


def sizes_of(scheduler: Any) -> ScheduledSizes | None:
    """A scheduler's sizes; None where they are not left to the plugin.

    Nor where steps were not timed: vLLM has fallen back to Model Runner V1, or there is no room.
    """
    if not hasattr(scheduler, _SIZES):
        config, sizes = scheduler.vllm_config, None
        if is_msd_config(config.speculative_config) and scheduled_sizes(config):
            if _costs(config) is not None:
                sizes = ScheduledSizes(make_rule(config), config)
            else:  # the schedule is no user's
                most = scheduler.num_spec_tokens
                scheduler.dynamic_sd_lookup = [most] * len(scheduler.dynamic_sd_lookup)
                logger.info(UNTIMED if scheduler.use_v2_model_runner else FALLEN_BACK)
        setattr(scheduler, _SIZES, sizes)
    return getattr(scheduler, _SIZES)


def _costs(vllm_config: Any) -> tuple[tuple[int, int, float], ...] | None:
    draft = vllm_config.speculative_config.draft_model_config.hf_config
    return getattr(draft, "msd_costs", None)


def make_rule(vllm_config: Any) -> SizeSchedule:
    """The rule of an engine whose costs are known."""
    draft = vllm_config.speculative_config.draft_model_config.hf_config
    return SizeSchedule(
        tree_config(vllm_config),
        scheduled_sizes(vllm_config),
        SizeCosts.of(_costs(vllm_config) or ()),
        vllm_config.scheduler_config.max_num_seqs,
        AcceptancePrior.from_config(draft.msd_draft["msd_acceptance"]),
    )


def wrap_initialize_kv_caches(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of ``EngineCore._initialize_kv_caches``, after which the workers are ready."""

    @functools.wraps(original)
    def initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        result = original(self, vllm_config)
        is_ours = is_msd_config(vllm_config.speculative_config)
        if is_ours and vllm_config.use_v2_model_runner and scheduled_sizes(vllm_config):
            prepare_costs(self.model_executor, vllm_config)
        return result

    return initialize_kv_caches


def wrap_make_spec_decoding_stats(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of ``Scheduler.make_spec_decoding_stats``, called for each verification."""

    @functools.wraps(original)
    def make_spec_decoding_stats(
        self: Any,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> Any:
        sizes: ScheduledSizes | None = getattr(self, _SIZES, None)
        if sizes is not None and num_draft_tokens:
            invalid = (num_invalid_spec_tokens or {}).get(request_id, 0)
            request = self.requests[request_id]
            sizes.verified(request, num_draft_tokens - invalid, num_accepted_tokens)
        return original(
            self,
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )

    return make_spec_decoding_stats


def prepare_costs(executor: Any, vllm_config: Any) -> None:
    """Find out what steps cost, from disk or by measuring, and keep it in the draft's config."""
    from vllm_msd.vllm_plugin.gpu.step_costs import machine_of

    key = table_key(vllm_config, executor.collective_rpc(machine_of)[0])
    origin, costs = "cached", SizeCosts.load(table_path(key), key)
    if costs is None:
        started = time.perf_counter()
        costs = measure(executor, vllm_config)
        if costs is None:
            return
        origin = f"measured in {time.perf_counter() - started:.1f} s"
        keep(costs, key)
    vllm_config.speculative_config.draft_model_config.hf_config.msd_costs = costs.points
    logger.info(
        "MSD drafts what pays: %s. Costs (%s, in %s): %s. Nodes to begin with, by requests: %s.",
        tree_config(vllm_config).in_words,
        origin,
        table_path(key),
        costs.gist(),
        make_rule(vllm_config).gist(),
    )


def measure(executor: Any, vllm_config: Any, seconds: float = SECONDS) -> SizeCosts | None:
    """Time steps of all sizes, small ones first, for about so long.

    Where time is left, all of them once more: the quicker one counts, as the rest was noise.
    Measuring ends early where the device has no memory for a step.

    Args:
        executor: of the workers.
        vllm_config: of the engine.
        seconds: without what the first steps take to warm up.

    Returns:
        None where there is no room for made-up requests.
    """
    from vllm_msd.vllm_plugin.gpu.step_costs import OUT_OF_MEMORY, TIMED, WARM_UP, time_steps

    def timed(requests: int, nodes: int) -> float | None:
        ranks = executor.collective_rpc(time_steps, args=(requests, nodes))
        return OUT_OF_MEMORY if OUT_OF_MEMORY in ranks else ranks[0]

    scheduler = vllm_config.scheduler_config
    sizes, most = scheduled_sizes(vllm_config), scheduler.max_num_seqs
    counts = sorted({most, *(2**power for power in range(most.bit_length()) if 2**power <= most)})
    places = [
        (requests, nodes)
        for nodes in sizes
        for requests in counts
        if requests * (1 + nodes) <= scheduler.max_num_batched_tokens
    ]
    # Where time is short, all sizes are known for few requests.
    places.sort(key=lambda place: (place[0] * (1 + place[1]), place[1]))
    timed(1, max(sizes))
    until = time.perf_counter() + seconds
    best: dict[tuple[int, int], float] = {}
    took, rows_then = 0.0, 1
    for requests, nodes in 2 * places:
        rows = requests * (1 + nodes)
        known = best.get((requests, nodes), took * max(1.0, rows / rows_then))
        if best and time.perf_counter() + (2 + WARM_UP + TIMED) * known > until:
            continue
        found = timed(requests, nodes)
        if found == OUT_OF_MEMORY:
            text = "MSD: no memory for a step of %d requests with %d drafts each; costs end there."
            logger.warning(text, requests, nodes)
            break
        if found is not None:
            best[requests, nodes] = min(found, best.get((requests, nodes), found))
            took, rows_then = found, rows
    points = [(*place, spent) for place, spent in best.items()]
    return SizeCosts.of(points) if any(nodes == 0 for _, nodes, _ in points) else None


def table_key(vllm_config: Any, machine: dict[str, Any]) -> dict[str, Any]:
    """What a table holds for: it is not used for anything else."""
    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    shape, draft = tree_config(vllm_config), speculative.draft_model_config.hf_config
    configs = [model.hf_config.to_dict(), draft.to_dict()]
    compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
    return {
        "machine": machine,
        "model": str(model.model),
        "draft": str(speculative.model),
        "configs": hashlib.sha256(
            json.dumps(configs, sort_keys=True, default=str).encode()
        ).hexdigest(),
        "dtype": str(model.dtype),
        "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "quantization": str(model.quantization),
        "parallelism": vllm_config.parallel_config.world_size,
        "attention": str(vllm_config.attention_config.backend),
        "compiled": f"{compilation.mode}, {compilation.cudagraph_mode}",
        "graphs": compilation.cudagraph_capture_sizes,
        "lora": vllm_config.lora_config is not None,
        "shape": [shape.num_nodes, shape.depth, shape.top_k],
        "sizes": scheduled_sizes(vllm_config),
        "acceptance": draft.msd_draft["msd_acceptance"],
        "requests": scheduler.max_num_seqs,
        "rows": scheduler.max_num_batched_tokens,
        "length": model.max_model_len,
        "versions": versions(),
    }
