"""What steps launch with and without the code for trees: `step_operations`, a job for `worker`."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

from tests.common import fp32_engine
from tests.common.cuda_graphs import engines
from tests.common.cuda_graphs.answers import OPTIONS
from tests.common.cuda_graphs.device import emulated_graphs
from tests.common.cuda_graphs.fast_kernels import fast_kernels
from tests.common.cuda_graphs.steps import Step, watched_steps
from tests.common.lossless import demo_requests


def steps_of(
    target: str,
    draft: str | None,
    requests: int = 2,
    longest: int | list[int] = 8,
    **speculation: Any,
) -> list[Step]:
    """The steps in which one engine answers some requests, the prompts' included.

    ``longest``: tokens of all answers, or of each.
    """
    from vllm import SamplingParams

    lengths = [longest] if isinstance(longest, int) else longest
    asked = demo_requests(target, requests, lengths, seed=50_000)
    params = [
        SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True) for r in asked
    ]
    with fp32_engine.running_engine(target, draft, **speculation, **OPTIONS) as engine:
        runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
        with watched_steps(runner) as steps:
            engine.generate([r.for_vllm() for r in asked], params, use_tqdm=False)
    return steps


def step_operations(
    *,
    runner: str,
    target: str,
    draft: str | None,
    plugin: bool = True,
    trees_in_place: bool = False,
    graphs: str | None = None,
) -> dict[str, Any]:
    """Names of what each step launches, on the wiring of a GPU.

    Args:
        runner: ``v2``.
        target, draft: folders; no draft, no speculation, else chains of 5.
        plugin: False leaves the plugin out, as if it were not installed.
        trees_in_place: put the attention for trees in the place of vLLM's first, as an engine with
            trees leaves it behind in its process.
        graphs: vLLM's ``cudagraph_mode``; None for none.
    """
    if plugin:
        from vllm_msd.vllm_plugin import plugin as entry

        entry.register()
    else:
        os.environ["VLLM_PLUGINS"] = ""
    with ExitStack() as stack:
        stack.enter_context(engines._triton_attention())
        stack.enter_context(fast_kernels())
        stack.enter_context(engines._graphs(False) if graphs else emulated_graphs())
        stack.enter_context(mock.patch.object(fp32_engine, "CUDAGRAPH_MODE", graphs))
        if trees_in_place:
            from vllm_msd.vllm_plugin.gpu.attention import register

            register()
        found = steps_of(target, draft)
    return {"steps": [step.names() for step in found], "ours": [step.ours() for step in found]}


def launches_by_batch(
    *, runner: str, target: str, draft: str, speculation: dict[str, Any], lengths: list[int]
) -> list[dict[str, Any]]:
    """What each step of a shrinking batch launches, its CUDA graphs emulated.

    Args:
        runner: ``v2``.
        target, draft: folders.
        speculation: further arguments of `fp32_engine.open_engine`.
        lengths: of the requests' answers; all begin at once.

    Returns:
        of each step: ``requests``, ``rows``, ``drafted``, launches ``outside`` graphs, and in each
        of the ``graphs`` replayed.
    """
    with engines.gpu_wiring("FULL_DECODE_ONLY"):
        found = steps_of(target, draft, requests=len(lengths), longest=lengths, **speculation)
    return [
        {
            "requests": step.requests,
            "rows": step.rows,
            "drafted": step.drafted,
            "outside": len(step.outside),
            "graphs": [len(graph) for graph in step.replays],
        }
        for step in found
    ]


def count_launches(
    *, runner: str, target: str, draft: str | None, speculation: dict[str, Any]
) -> dict[str, Any]:
    """How many launches each step of a decoding request has, its CUDA graphs emulated.

    Args:
        runner: ``v2``.
        target, draft: folders; no draft, no speculation.
        speculation: further arguments of `fp32_engine.open_engine`.

    Returns:
        under ``steps``, of those that replay graphs only: ``outside``, ``ours`` and ``graphs``, one
        number a replay in their order, and under ``ours_by_name`` the names of ours. ``prompt``:
        names of ours in the first step, in which nobody has drafts.
    """
    with engines.gpu_wiring("FULL_DECODE_ONLY"):
        found = steps_of(target, draft, requests=1, longest=24, **speculation)
    most = max(len(step.replays) for step in found)
    return {
        "prompt": sorted({*found[0].ours()}),
        "steps": [
            {
                "outside": len(step.outside),
                "ours": len(step.ours()),
                "ours_by_name": dict(sorted(Counter(step.ours()).items())),
                "graphs": [len(graph) for graph in step.replays],
            }
            for step in found
            if len(step.replays) == most
        ],
    }
