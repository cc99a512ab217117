"""CUDA graphs of whole drafting rounds: one for each number of requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typing_extensions import override
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.math_utils import round_up
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)

from vllm_msd.vllm_plugin.configuration.capture_sizes import requests_by_rows


class TreeCudaGraphManager(SpeculatorCudaGraphManager):
    """Captures all levels of R requests in one graph, for each R that the target has a graph of.

    So after a replay of the target's, one of these fits. A smaller batch pads the next larger one.
    ``decode_query_len`` is the width of a level.
    """

    @override
    def _init_candidates(self) -> None:
        """By requests: vLLM rounds capture sizes to multiples of a level's width instead."""
        sizes = self.compilation_config.cudagraph_capture_sizes
        if not (self.cudagraph_mode and sizes):
            return
        width, limit = self.decode_query_len, self.compilation_config.max_cudagraph_capture_size
        counts = sorted(
            {
                r // rows
                for rows in requests_by_rows(self.vllm_config)
                for s in sizes
                if (r := round_up(s, rows)) <= min(self.max_num_reqs * rows, limit)
            }
        )
        descs = [
            BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.FULL,
                num_tokens=n * width,
                num_reqs=n,
                uniform_token_count=width,
            )
            for n in counts
        ]
        self._capture_descs = {CUDAGraphMode.FULL: descs[::-1]} if descs else {}
        smaller = 0
        for desc in descs:
            for num_tokens in range(smaller + 1, desc.num_tokens + 1):
                self._candidates[(num_tokens, 0)] = [desc]
            smaller = desc.num_tokens

    @override
    def capture(self, forward_fn: Callable, *args: Any, **kwargs: Any) -> None:
        """A round is the same for every number of nodes that is verified of its trees."""
        super().capture(forward_fn, *args, **{**kwargs, "specialize_spec_tokens": False})
