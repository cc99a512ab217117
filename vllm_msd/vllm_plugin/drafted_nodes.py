"""How many nodes were drafted, on its way to the Prometheus series, where that varies by step.

vLLM's figures of a step come from its scheduler, which sees what is verified. Under Model Runner V1
the worker says how many nodes it drafted, with the drafts. Under Model Runner V2, and where V1 is
scheduled asynchronously as it is on GPUs, it drafts as many for each request as the scheduler told
it to. The sum goes to the front end as one more entry behind
`SpecDecodingStats.num_draft_tokens_per_pos`, which nothing in vLLM reads: the figures are sent
field by field, so there is no other place for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_msd.vllm_plugin.configuration.tree_settings import (
    is_msd_config,
    sizes_vary,
    tree_config,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

FROM_WORKER = "msd_drafted_nodes"  # attribute of the worker's `DraftTokenIds`
_COUNT = "msd_drafted_count"  # attribute of an MSD engine's scheduler


@dataclass
class DraftedCount:
    """Nodes drafted since the last figures.

    Attributes:
        total: of all requests.
        each: for a request in the step scheduled last, where the scheduler says it.
    """

    total: int = 0
    each: int = 0


def drafted_in(stats: SpecDecodingStats) -> int:
    """The nodes drafted that came with a step's figures; 0 if none did."""
    return sum(stats.num_draft_tokens_per_pos[stats.num_spec_tokens :])


def nodes_drafted(vllm_config: VllmConfig, wanted: int) -> int:
    """Nodes that are drafted for a request where the scheduler wants so many."""
    tree = tree_config(vllm_config)
    if wanted == 0 or tree.is_chain:
        return wanted
    return tree.shape.shallower(tree.shape.levels_for(wanted)).total_tokens - 1


def note_scheduled(scheduler: Any, output: Any) -> None:
    """Count what was drafted for the trees that a step verifies, where the scheduler says it.

    Args:
        scheduler: vLLM's, of an MSD engine.
        output: its `SchedulerOutput`.
    """
    count = _count_of(scheduler)
    if count is not None and output.num_scheduled_tokens:
        count.total += count.each * len(output.scheduled_spec_decode_tokens)
        count.each = nodes_drafted(scheduler.vllm_config, output.num_spec_tokens_to_schedule)


def wrap_update_draft_token_ids(original: Callable[..., None]) -> Callable[..., None]:
    """Replacement of ``Scheduler.update_draft_token_ids``, which takes the drafts from a worker."""

    @functools.wraps(original)
    def update_draft_token_ids(self: Any, draft_token_ids: Any) -> None:
        original(self, draft_token_ids)
        count = _count_of(self)
        if count is not None and not self.use_v2_model_runner:
            handed_over = sum(map(len, draft_token_ids.draft_token_ids))
            count.total += getattr(draft_token_ids, FROM_WORKER, handed_over)

    return update_draft_token_ids


def wrap_make_stats(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of ``Scheduler.make_stats``; what is drafted before a step without figures waits
    for the next one."""

    @functools.wraps(original)
    def make_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
        stats = original(self, *args, **kwargs)
        count = _count_of(self)
        if count is not None and stats is not None and stats.spec_decoding_stats is not None:
            stats.spec_decoding_stats.num_draft_tokens_per_pos.append(count.total)
            count.total = 0
        return stats

    return make_stats


def _count_of(scheduler: Any) -> DraftedCount | None:
    """None where the series needs none: another engine's scheduler, or sizes that are fixed."""
    if not hasattr(scheduler, _COUNT):
        config = scheduler.vllm_config.speculative_config
        varies = is_msd_config(config) and sizes_vary(config)
        setattr(scheduler, _COUNT, DraftedCount() if varies else None)
    return getattr(scheduler, _COUNT)
