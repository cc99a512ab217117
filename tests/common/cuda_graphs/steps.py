"""What a step of a Model Runner V2 launches, in graphs and beside them: `watched_steps`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import _disable_current_modes

from tests.common.cuda_graphs.graph import EmulatedCUDAGraph, Launch, _Recorder

OURS = ("/vllm_msd/", "/kernels/")


@dataclass
class Step:
    """One step. ``outside``: launches that Python issues; ``replays``: what each graph launches.

    ``requests`` and ``rows`` that it has, and how many of those are ``drafted`` tokens.
    """

    requests: int = 0
    rows: int = 0
    drafted: int = 0
    outside: list[Launch] = field(default_factory=list)
    replays: list[list[Launch]] = field(default_factory=list)

    def names(self) -> list[str]:
        """Of all launches outside graphs, then of the graphs' in order."""
        return [x.name for x in (*self.outside, *(y for graph in self.replays for y in graph))]

    def ours(self) -> list[str]:
        """Of the launches outside graphs, those that a line of this package issues itself."""
        return [x.name for x in self.outside if _issued_here(x)]


def _issued_here(launch: Launch) -> bool:
    lines = (frame.filename for frame in launch.where if "/triton/" not in frame.filename)
    innermost = next(lines, "")
    return any(part in innermost for part in OURS)


@contextmanager
def watched_steps(model_runner: Any) -> Iterator[list[Step]]:
    """Record the steps that the runner makes inside; within `device.emulated_graphs` only.

    What a step does with a tensor on the host is let through, and counted if it launches.
    """
    steps: list[Step] = []
    replay = EmulatedCUDAGraph.replay

    def noted_replay(graph: EmulatedCUDAGraph) -> None:
        steps[-1].replays.append(graph.launches)
        recording, EmulatedCUDAGraph.current = EmulatedCUDAGraph.current, None
        try:
            with _disable_current_modes():
                replay(graph)
        finally:
            EmulatedCUDAGraph.current = recording

    def recorded(call: Any, begins: bool) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if begins:
                order = args[0]
                drafts = order.scheduled_spec_decode_tokens.values()
                steps.append(
                    Step(
                        len(order.num_scheduled_tokens),
                        order.total_num_scheduled_tokens,
                        sum(map(len, drafts)),
                    )
                )
            recording = EmulatedCUDAGraph()
            EmulatedCUDAGraph.current = recording
            try:
                with _Recorder(recording):
                    return call(*args, **kwargs)
            finally:
                EmulatedCUDAGraph.current = None
                steps[-1].outside += recording.launches

        return run

    with (
        mock.patch.object(EmulatedCUDAGraph, "strict", False),
        mock.patch.object(EmulatedCUDAGraph, "replay", noted_replay),
        mock.patch.object(
            model_runner, "execute_model", recorded(model_runner.execute_model, begins=True)
        ),
        mock.patch.object(
            model_runner, "sample_tokens", recorded(model_runner.sample_tokens, begins=False)
        ),
    ):
        yield steps
