"""CUDA graphs of whole drafting rounds: one for each number of requests and of levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.math_utils import round_up
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)

from vllm_msd.vllm_plugin.configuration.capture_sizes import requests_by_rows, thinned


@dataclass(frozen=True)
class RoundDescriptor(BatchExecutionDescriptor):
    """A graph of a drafting round. ``levels``: how many are fed to the draft."""

    levels: int = 0


class TreeCudaGraphManager(SpeculatorCudaGraphManager):
    """Captures a pass over R requests in one graph, for each R that the target has a graph of.

    So after a replay of the target's, one of these fits, up to the most requests that the pass
    takes at once. A smaller batch pads the next larger one. ``decode_query_len`` is how many rows a
    request has.

    With ``levels`` the pass is a whole drafting round, of as many levels as a batch of so many
    requests asks for: it is handed them as ``num_speculative_steps``. A graph is captured for each
    number that a batch which it takes can ask for.

    Args:
        most_requests: that the pass's buffers hold.
        least_rows: that the target has for a request in a step before this pass.
        levels: by number of requests, all numbers of levels that they can ask for; None for a
            pass that knows no levels.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        cudagraph_mode: CUDAGraphMode,
        decode_query_len: int,
        *,
        most_requests: int,
        least_rows: int = 1,
        levels: Mapping[int, Set[int]] | None = None,
    ) -> None:
        self.levels = levels
        rows = vllm_config.scheduler_config.max_num_batched_tokens  # of the draft's buffers
        self.most_requests = min(most_requests, rows // decode_query_len)
        self.least_rows = least_rows
        super().__init__(vllm_config, device, cudagraph_mode, decode_query_len)

    @override
    def _init_candidates(self) -> None:
        """By requests: vLLM rounds capture sizes to multiples of a level's width instead."""
        sizes = self.compilation_config.cudagraph_capture_sizes
        if not (self.cudagraph_mode and sizes):
            return
        width, limit = self.decode_query_len, self.compilation_config.max_cudagraph_capture_size
        counts: set[int] = set()
        for rows in requests_by_rows(self.vllm_config):
            if rows >= self.least_rows:
                most = min(self.max_num_reqs * rows, limit)
                counts |= {r // rows for s in sizes if (r := round_up(s, rows)) <= most}
        counts = {min(n, self.most_requests) for n in thinned(self.vllm_config, counts)} - {0}
        descs: list[BatchExecutionDescriptor] = []
        smaller = 0
        for n in sorted(counts):
            desc = BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.FULL,
                num_tokens=n * width,
                num_reqs=n,
                uniform_token_count=width,
            )
            for num_tokens in range(smaller * width + 1, desc.num_tokens + 1):
                self._candidates[(num_tokens, 0)] = [desc]
            if self.levels is None:
                descs.append(desc)
            else:
                batches = range(smaller + 1, n + 1)
                asked = {x for batch in batches for x in self.levels.get(batch, ())}
                descs += [RoundDescriptor(**vars(desc), levels=x) for x in sorted(asked)]
            smaller = n
        self._capture_descs = {CUDAGraphMode.FULL: descs[::-1]} if descs else {}

    def of_round(self, num_reqs: int, levels: int) -> BatchExecutionDescriptor:
        """What `run_fullgraph` takes for a round; of mode NONE where there is no such graph."""
        width = self.decode_query_len
        desc = self.dispatch(num_reqs, num_reqs * width, width, 0)
        if desc.cg_mode != CUDAGraphMode.FULL:
            return desc
        found = RoundDescriptor(**vars(desc), levels=levels)
        if found in self.graphs:
            return found
        return BatchExecutionDescriptor(CUDAGraphMode.NONE, desc.num_tokens, num_reqs)

    @override
    def capture(self, forward_fn: Callable, *args: Any, **kwargs: Any) -> None:
        """vLLM's own numbers of drafted tokens make no difference here, levels do."""
        kwargs["specialize_spec_tokens"] = False
        if self.levels is None:
            super().capture(forward_fn, *args, **kwargs)
            return
        every = self._capture_descs
        descs = every.get(CUDAGraphMode.FULL, [])
        try:
            for levels in sorted({desc.levels for desc in descs}, reverse=True):
                chosen = [desc for desc in descs if desc.levels == levels]
                self._capture_descs = {CUDAGraphMode.FULL: chosen}
                super().capture(partial(forward_fn, num_speculative_steps=levels), *args, **kwargs)
        finally:
            self._capture_descs = every
