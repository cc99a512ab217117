"""One engine on the demo pair, and what can be compared between engines with and without graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from tests.common.cuda_graphs import sabotage
from tests.common.cuda_graphs.adaptive import adaptive_verification
from tests.common.cuda_graphs.engines import replays
from tests.common.cuda_graphs.moving_sizes import (
    left_to_the_plugin,
    steps_of,
    time_some_steps,
)
from tests.common.fp32_engine import (
    acceptance,
    counted,
    forced_async_scheduling,
    open_engine,
    scheduler_of,
)
from tests.common.lossless import demo_requests

# At most 6 at a time come and go; the cache has room for them, and prompts are cut in chunks.
OPTIONS = {
    "max_num_seqs": 6,
    "max_num_batched_tokens": 256,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
}


def launches_of_a_round(model_runner: Any) -> dict[str, int]:
    """What the graph of one request's drafting round launches: in the draft's layer, and beside."""
    manager = getattr(model_runner.speculator, "decode_cudagraph_manager", None)
    counts = {"draft layer": 0, "beside": 0}
    for desc, graph in manager.graphs.items() if manager is not None else ():
        if desc.num_reqs != 1:
            continue
        for launch in graph.launches:
            in_layer = any(
                frame.filename.endswith("draft_model.py") and frame.name == "forward"
                for frame in launch.where
            )
            counts["draft layer" if in_layer else "beside"] += 1
    return counts


def drafting_memory(model_runner: Any) -> dict[str, int]:
    """Bytes of the large tensors that a `TreeSpeculator` made for itself, by kind."""
    speculator = model_runner.speculator
    if not hasattr(speculator, "requests_at_once"):
        return {}
    buffers, store = speculator.buffers, model_runner.model_state.store
    kinds = {
        "growth": (buffers.parts, *buffers.best, *buffers.candidates, *buffers.beams),
        "trees": (store.parents, store.depths, store.ancestors),
        "roots": (speculator.root_hidden, speculator.first),
    }
    return {kind: sum(t.nbytes for t in tensors) for kind, tensors in kinds.items()}


def profiled_rows(model_runner: Any) -> int:
    """Rows of logits that vLLM's memory profile has the target make for a verification, at most."""
    speculator, seen = model_runner.speculator, [0]
    original = speculator.target_logits

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return original(hidden)

    with (
        mock.patch.object(speculator, "target_logits", watched),
        mock.patch.object(torch.accelerator, "synchronize", lambda *_: None),
    ):
        model_runner.profile_run()
    return max(seen)


@contextmanager
def scheduled_drafts(engine: Any) -> Iterator[dict[str, list[int]]]:
    """How many drafts each request has in each of its decoding steps inside, by request."""
    scheduler, found = scheduler_of(engine), {}
    schedule = scheduler.schedule

    def noted(*args: Any) -> Any:
        output = schedule(*args)
        for req_id, tokens in output.num_scheduled_tokens.items():
            drafts = len(output.scheduled_spec_decode_tokens.get(req_id, ()))
            steps = found.setdefault(req_id.split("-")[0], [])  # as the caller knows it
            if tokens == 1 + drafts:
                steps.append(drafts)
        return output

    with mock.patch.object(scheduler, "schedule", noted):
        yield found


def graph_answers(
    *,
    runner: str,
    target: str,
    draft: str | None,
    requests: int,
    tree: tuple[int, int] | None = None,
    spec_tokens: int = 5,
    longest: int = 24,
    bug: str | None = None,
    async_scheduling: bool = False,
    sampled: bool = False,
    logits_bytes: int | None = None,
    schedule: list[list[int]] | None = None,
    own: list[list[tuple[str, Any]]] | None = None,
    free_rows: int | None = None,
    best: list[int] | None = None,
    timed: list[int] | None = None,
    options: dict[str, Any] | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Answers, accepted counts and replays of an engine, under `engines.gpu_wiring` or not.

    A wrong draft changes no token, so graphs are compared by the counts as well.

    Args:
        runner: ``v2``.
        target, draft: folders; no draft, no speculation.
        requests: how many, of every kind in turn, of different lengths.
        tree: depth and width of trees; None for chains.
        spec_tokens: of a chain, or nodes of a tree.
        longest: tokens of the longest answers.
        bug: a function in `sabotage`, done to the runner once its graphs are captured.
        async_scheduling: schedule a step before the output of the one before is known.
        sampled: at temperature 1 with a seed each.
        logits_bytes: room for the logits of a tree's level; the less, the fewer requests at once.
        schedule: drafted tokens by batch size, see `open_engine`.
        own: what requests say about their own drafts, in turn (``extra_args``).
        free_rows: verify adaptively, see `adaptive_verification`; None for all drafts.
        best: leave sizes to the plugin, by costs that favour these, see `left_to_the_plugin`.
        timed: numbers of nodes whose steps are timed first, with two made-up requests.
        options: of the engine, over `OPTIONS`.
        profile: run vLLM's memory profile once more, and look.
    """
    from vllm import SamplingParams

    asked = demo_requests(target, requests, [longest - 3 * (i % 4) for i in range(7)], seed=70_000)
    params = [
        SamplingParams(
            temperature=1.0 if sampled else 0.0,
            seed=i if sampled else None,
            max_tokens=request.max_tokens,
            ignore_eos=True,
            extra_args=dict(own[i % len(own)]) if own else None,
        )
        for i, request in enumerate(asked)
    ]
    if logits_bytes is not None:
        from vllm_msd.tree import grow

        grow.LOGITS_BYTES = logits_bytes  # of this process
    settings = {**OPTIONS, **(options or {}), "adaptive": free_rows is not None}
    watching = adaptive_verification(free_rows) if free_rows else nullcontext([])
    if best is not None:
        settings["speculative_config"] = {"method": "msd", "model": draft}
    with watching as budgets, left_to_the_plugin(best) if best else nullcontext():
        with forced_async_scheduling() if async_scheduling else nullcontext():
            engine = open_engine(
                target, draft, spec_tokens, tree=tree, schedule=schedule, **settings
            )
        model_runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
        if bug is not None:
            getattr(sabotage, bug)(model_runner)
        times = time_some_steps(engine, 2, timed) if timed else []
        with scheduled_drafts(engine) as drafts, steps_of(engine) as steps:
            outputs = engine.generate([r.for_vllm() for r in asked], params, use_tqdm=False)
    return {
        "speculator": type(model_runner.speculator).__name__,
        "requests_at_once": getattr(model_runner.speculator, "requests_at_once", None),
        "profiled_rows": profiled_rows(model_runner) if profile else None,
        "memory": drafting_memory(model_runner),
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
        "acceptance": counted(acceptance(engine)),
        "budgets": [[budget, own.tolist()] for budget, own in budgets],
        "steps": steps,
        "times": times,
        "drafts": [drafts[output.request_id] for output in outputs],
        "replays": replays(engine),
        "launches": launches_of_a_round(model_runner),
    }
