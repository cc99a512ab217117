"""Sizes of CUDA graphs for trees: a request has a row for each node, so batches are large in rows.

vLLM's own sizes end at 512 rows (1,024 on Blackwell), which is 8 requests of 61. And where a
schedule gives requests different numbers of rows, it looks for a batch's graph among those of the
next number of rows alone.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_msd.vllm_plugin.configuration.tree_settings import (
    is_msd_config,
    scheduled_sizes,
    wants_trees,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Numbers of requests to capture: padding adds a third at most, from 12 on a quarter.
REQUESTS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
# And where sizes follow the load, so that large batches have small ones.
MANY_REQUESTS = (*REQUESTS, 80, 96, 112, 128, 160, 192, 224, 256)
# A step of so many rows takes its time on any device; its launches are no longer what costs.
MAX_ROWS = 2048
OWN_SIZES = (
    "MSD: the sizes of CUDA graphs were given, and what is drafted follows the load. Batches that "
    "no graph fits run eagerly, so their sizes look slow and are not chosen. Leave "
    "cudagraph_capture_sizes and max_cudagraph_capture_size out, or give num_speculative_tokens."
)

logger = init_logger("vllm.vllm_msd")


def drafted_by_requests(vllm_config: VllmConfig) -> dict[int, tuple[int, ...]]:
    """Tokens that a step may draft, by its number of requests.

    One number, that of a schedule, or any of those that the scheduler chooses from by itself.
    """
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    config, most = vllm_config.speculative_config, vllm_config.num_speculative_tokens
    largest = vllm_config.scheduler_config.max_num_seqs
    schedule = config.num_speculative_tokens_per_batch_size
    if sizes := scheduled_sizes(vllm_config):
        return dict.fromkeys(range(1, largest + 1), tuple(sizes))
    if not schedule:
        return dict.fromkeys(range(1, largest + 1), (most,))
    tokens = build_dynamic_sd_schedule_lookup(schedule, largest, most)
    return {batch: (tokens[batch],) for batch in range(1, largest + 1)}


def requests_by_rows(vllm_config: VllmConfig) -> dict[int, int]:
    """Rows that a decoding request may have, and the most requests that run with so many.

    That is a row more than its drafted tokens.
    """
    by_requests = drafted_by_requests(vllm_config).items()
    return {n + 1: batch for batch, drafted in by_requests for n in drafted}


def tree_capture_sizes(
    by_rows: dict[int, int], max_rows: int, requests: Sequence[int] = REQUESTS
) -> set[int]:
    """Rows of the decoding batches that are worth a graph.

    Args:
        by_rows: of `requests_by_rows`.
        max_rows: of a step.
        requests: numbers of requests to capture, rising.
    """
    return {
        rows * n
        for rows, most in by_rows.items()
        for n in {*requests, min(most, requests[-1])}
        if n <= most and rows * n <= min(max_rows, MAX_ROWS)
    }


def wrap_set_cudagraph_sizes(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Replacement of ``VllmConfig._set_cudagraph_sizes``."""

    @functools.wraps(original)
    def set_cudagraph_sizes(self: Any) -> None:
        compilation = self.compilation_config
        given = compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size
        original(self)
        sizes = compilation.cudagraph_capture_sizes
        if not sizes or not (wants_trees(self) or _moves(self)):
            return
        added = tree_capture_sizes(
            requests_by_rows(self),
            self.scheduler_config.max_num_batched_tokens,
            MANY_REQUESTS if _moves(self) else REQUESTS,
        )
        if given != (None, None):  # the user's, or ours: a server's process comes here twice
            if _moves(self) and not added <= {*sizes}:
                logger.warning_once(OWN_SIZES)
            return
        compilation.cudagraph_capture_sizes = sorted({*sizes, *added})
        compilation.max_cudagraph_capture_size = max(*sizes, *added)

    return set_cudagraph_sizes


def wrap_init_candidates(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Replacement of ``CudaGraphManager._init_candidates``."""

    @functools.wraps(original)
    def init_candidates(self: Any) -> None:
        original(self)
        config = self.vllm_config.speculative_config
        if is_msd_config(config) and config.num_speculative_tokens_per_batch_size:
            if _moves(self.vllm_config):
                thin_out(self._candidates, self._capture_descs)
            add_larger_graphs(self._candidates, self._capture_descs)

    return init_candidates


def _moves(vllm_config: VllmConfig) -> bool:
    """Whether the scheduler chooses a step's number of drafted tokens by itself."""
    return is_msd_config(vllm_config.speculative_config) and bool(scheduled_sizes(vllm_config))


def thin_out(
    candidates: Mapping[tuple[int, int], list[Any]], captured: Mapping[Any, list[Any]]
) -> None:
    """Leave out graphs of numbers of requests that a slightly larger one can take as well.

    vLLM rounds each size that it captures to each number of rows that a request may have: with
    six numbers, six graphs for each. Those that `worth_a_graph` names stay.

    Args:
        candidates, captured: as in `add_larger_graphs`, which fills the gaps.
    """
    counts: dict[tuple[int, int], set[int]] = {}
    every = [desc for descs in captured.values() for desc in descs]
    for desc in every:
        if desc.uniform_token_count is not None:
            kind = desc.num_active_loras, desc.uniform_token_count
            counts.setdefault(kind, set()).add(desc.num_reqs)
    kept = {kind: worth_a_graph(found) for kind, found in counts.items()}
    for descs in (*captured.values(), *candidates.values()):
        descs[:] = [
            desc
            for desc in descs
            if (rows := desc.uniform_token_count) is None
            or desc.num_reqs in kept[desc.num_active_loras, rows]
        ]


def worth_a_graph(counts: Iterable[int]) -> set[int]:
    """Of these numbers of requests (at least one) those of `MANY_REQUESTS`, multiples of 64 beyond
    them, and the largest."""
    found = set(counts)
    beyond = {n for n in found if n > MANY_REQUESTS[-1] and n % 64 == 0}
    return found.intersection(MANY_REQUESTS) | beyond | {max(found)}


def thinned(vllm_config: VllmConfig, counts: set[int]) -> set[int]:
    """Numbers of requests to capture, of these: fewer where `thin_out` leaves some out."""
    return worth_a_graph(counts) if counts and _moves(vllm_config) else counts


def add_larger_graphs(
    candidates: Mapping[tuple[int, int], list[Any]], captured: Mapping[Any, list[Any]]
) -> None:
    """Let a batch whose requests have equally many rows pad the next graph of such requests.

    With graphs of 2 and of 6 requests with 3 rows, and of one with 17, a batch of 4 with 3 finds
    that of 17 rows as the next larger one, which is not its own, and would run eagerly.

    Args:
        candidates: descriptions of graphs by number of rows and of adapters, in the order in which
            they are tried; graphs of equally many rows a request are added behind those found, and
            before graphs of any rows.
        captured: all descriptions, by mode.
    """
    by_kind: dict[tuple[int, int], list[Any]] = {}
    for desc in (desc for descs in captured.values() for desc in descs):
        if desc.uniform_token_count is not None and desc.num_ubatches == 1:
            kind = desc.num_active_loras, desc.uniform_token_count
            by_kind.setdefault(kind, []).append(desc)
    for descs in by_kind.values():
        descs.sort(key=lambda desc: desc.num_tokens)
    for (num_tokens, loras), found in candidates.items():
        larger = []
        for (with_loras, _), descs in by_kind.items():
            place = bisect_left([desc.num_tokens for desc in descs], num_tokens)
            if with_loras == loras and place < len(descs) and descs[place] not in found:
                larger.append(descs[place])
        uniform = [desc for desc in found if desc.uniform_token_count is not None]
        found[:] = [*uniform, *larger, *(desc for desc in found if desc not in uniform)]
