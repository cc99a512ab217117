"""Prometheus series about trees, beside vLLM's own about speculative decoding.

A tree settles as a chain, so vLLM's series hold for trees as they stand: `num_drafts` counts
verifications, `num_draft_tokens` the nodes verified, and a position is a depth. What a request got
is vLLM's too (`--per-request-spec-decode-metrics`). Missing are how large the verified trees were,
how many nodes were drafted for them, and depths by name.

Where sizes vary (they follow the load, or a schedule), the sizes of verifications are what was
allowed, and the nodes drafted are counted where that is known (`drafted_nodes`): they come with the
step's figures.

The series are counters named `vllm:msd_...`: vLLM's Ray wrapper has only counters here, and vLLM
unregisters and lists what starts with `vllm:`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_msd.vllm_plugin.configuration.tree_settings import sizes_vary
from vllm_msd.vllm_plugin.drafted_nodes import drafted_in

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig
    from vllm.v1.spec_decode.metrics import SpecDecodingProm, SpecDecodingStats

_SERIES = "msd_series"  # where a SpecDecodingProm of an MSD engine keeps its TreeSeries


class TreeSeries:
    """The series of one front end.

    Args:
        counter: the class of Prometheus counters, or its Ray twin.
        num_nodes: nodes of the largest tree.
        depth: how deep they lie at most.
        labelnames: vLLM's labels (model and engine).
        engines: their values by engine index.
        is_fixed: whether all of them are drafted for each verification; else a step says itself how
            many were.
    """

    def __init__(
        self,
        counter: Callable[..., Any],
        num_nodes: int,
        depth: int,
        labelnames: list[str],
        engines: dict[int, list[object]],
        is_fixed: bool = True,
    ) -> None:
        drafted = counter(
            name="vllm:msd_drafted_nodes",
            documentation="Nodes drafted. vllm:spec_decode_num_draft_tokens counts those that were "
            "left to be verified: where sizes follow the load, what pays; and nothing beyond the "
            "scheduler's budget or the model's length.",
            labelnames=labelnames,
        )
        verifications = counter(
            name="vllm:msd_verifications",
            documentation="Verifications by the number of drafted nodes in them.",
            labelnames=[*labelnames, "nodes"],
        )
        accepted = counter(
            name="vllm:msd_accepted_tokens_per_depth",
            documentation="Accepted drafted tokens by their depth in the tree, from 1 on.",
            labelnames=[*labelnames, "depth"],
        )
        self._num_nodes = num_nodes
        self._is_fixed = is_fixed
        self._drafted = {index: drafted.labels(*values) for index, values in engines.items()}
        self._verifications = {
            index: [verifications.labels(*values, str(n)) for n in range(num_nodes + 1)]
            for index, values in engines.items()
        }
        self._accepted = {
            index: [accepted.labels(*values, str(d + 1)) for d in range(depth)]
            for index, values in engines.items()
        }

    def observe(self, stats: SpecDecodingStats, engine: int) -> None:
        """Add one step of one engine."""
        drafted = stats.num_drafts * self._num_nodes if self._is_fixed else drafted_in(stats)
        self._drafted[engine].inc(drafted)
        # The n-th entry counts the trees of more than n nodes.
        larger = [stats.num_drafts, *stats.num_draft_tokens_per_pos[: self._num_nodes], 0]
        for nodes, series in enumerate(self._verifications[engine]):
            series.inc(larger[nodes] - larger[nodes + 1])
        for series, count in zip(
            self._accepted[engine], stats.num_accepted_tokens_per_pos, strict=False
        ):
            series.inc(count)


def wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    """Replacement of `SpecDecodingProm.__init__`: an MSD engine's front end gets its series."""

    @functools.wraps(original)
    def __init__(
        self: SpecDecodingProm,
        speculative_config: SpeculativeConfig | None,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        is_diffusion: bool = False,
    ) -> None:
        original(self, speculative_config, labelnames, per_engine_labelvalues, is_diffusion)
        draft = getattr(speculative_config, "draft_model_config", None)
        hf_config = getattr(draft, "hf_config", None)
        depth = getattr(hf_config, "msd_tree_depth", None)
        series = None
        if depth is not None:
            shapes = hf_config.msd_auto
            series = TreeSeries(
                self._counter_cls,
                speculative_config.num_speculative_tokens,
                max([depth, *(shape[1] for shape in shapes)]),
                labelnames,
                per_engine_labelvalues,
                is_fixed=not sizes_vary(speculative_config),
            )
        setattr(self, _SERIES, series)

    return __init__


def wrap_observe(original: Callable[..., None]) -> Callable[..., None]:
    """Replacement of `SpecDecodingProm.observe`, called for each step with verifications."""

    @functools.wraps(original)
    def observe(
        self: SpecDecodingProm, spec_decoding_stats: SpecDecodingStats, engine_idx: int = 0
    ) -> None:
        original(self, spec_decoding_stats, engine_idx)
        series: TreeSeries | None = getattr(self, _SERIES)
        if series is not None:
            series.observe(spec_decoding_stats, engine_idx)

    return observe
