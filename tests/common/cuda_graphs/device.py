"""Puts the emulated graphs in the place of torch's, and Triton's interpreter under their eyes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from tests.common.cuda_graphs.graph import (
    CaptureError,
    EmulatedCUDAGraph,
    _culprit,
    as_kernel,
    graph,
)


def _waits(name: str, otherwise: Any = None) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if EmulatedCUDAGraph.current is not None:
            raise CaptureError(f"under capture, {name} waits for the device: {_culprit()}")
        return otherwise(*args, **kwargs) if otherwise else None

    return call


@contextmanager
def emulated_graphs() -> Iterator[type[EmulatedCUDAGraph]]:
    """Inside, `torch.cuda.CUDAGraph` works on CPU tensors and interpreted Triton kernels.

    ``TRITON_INTERPRET=1`` has to be set before Triton's kernels are imported.
    """
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def recording(executor: Any, *args: Any, **kwargs: Any) -> None:
        run = as_kernel(executor.fn.__name__, partial(launch, executor))
        run(*args, **kwargs)

    pools = iter(range(1, 1 << 30))
    replacements = [
        (torch.cuda, "CUDAGraph", EmulatedCUDAGraph),
        (torch.cuda, "graph", graph),
        (torch.cuda.graphs, "CUDAGraph", EmulatedCUDAGraph),
        (torch.cuda.graphs, "graph", graph),
        (torch.cuda, "graph_pool_handle", lambda: (0, next(pools))),
        (torch.cuda, "is_current_stream_capturing", lambda: EmulatedCUDAGraph.current is not None),
        (torch.cuda, "synchronize", _waits("torch.cuda.synchronize()")),
        (torch.accelerator, "synchronize", _waits("torch.accelerator.synchronize()")),
        (GridExecutor, "__call__", recording),
    ]
    with ExitStack() as stack:
        for place, name, value in replacements:
            stack.enter_context(mock.patch.object(place, name, value))
        yield EmulatedCUDAGraph
