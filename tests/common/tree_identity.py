"""Tree drafting on the constructed pairs: no token differs from no speculation.

The cases of `chain_identity` under an engine that drafts trees, cases of what only trees can get
wrong, a random workload, and the same with the plugin broken on purpose. The pair's draft is unsure
(`tiny.build_pair` with ``decoys``), so that other children than the first are accepted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

from tests.common import workload
from tests.common.chain_identity import (
    CASES,
    MAX_MODEL_LEN,
    Run,
    answers_of_plain_engine,
    check_case,
    engine_options,
    greedy,
    require_runner,
)
from tests.common.cuda_graphs.engines import replays
from tests.common.fp32_engine import (
    acceptance,
    counted,
    forced_async_scheduling,
    open_engine,
    pictures_kept_for_resumption,
    running_engine,
    scheduler_of,
)
from tests.common.sampling import use_torch_top_p
from tests.common.tree_mutations import mutated, watched_acceptance

NODES, DEPTH, TOP_K = 12, 4, 3  # with 44 tokens a step, a batch's last trees are cut short


def cut_trees(run: Run) -> Any:
    """Six requests that all draft: 44 tokens a step are three trees and the first of a fourth."""
    return run.ask([run.prompt(f"{i} go on") for i in range(6)], max_tokens=24)


def ends_of_context(run: Run) -> Any:
    """Several requests run into ``max_model_len``, each after another number of tokens."""
    prompts = [run.prompt("{} " + "x" * (MAX_MODEL_LEN - 45 - 2 * i), 7) for i in range(4)]
    answers = run.ask(prompts, max_tokens=MAX_MODEL_LEN)
    run.seen["lengths"] = [len(answer[0][0]) for answer in answers]
    return answers


def settled_prefixes(run: Run) -> Any:
    """Prompts that go on from an answer find its blocks in the cache, as acceptance settled them.

    A key or value left in the wrong slot there changes what is said next.
    """
    beginnings = [
        run.prompt("tell a long story. "),
        run.prompt("{} what is to be seen here? ", 1),
        run.prompt("and once more: {} {} ", 2, 3),
    ]
    first = run.ask(beginnings, max_tokens=100)
    lengths = run.seen["prompt_tokens"]
    continued = [
        {**prompt, "prompt": prompt["prompt"] + answer[0][1] + end}
        for end in ("", " and?")
        for prompt, answer in zip(beginnings, first, strict=True)
    ]
    second = run.ask(continued, max_tokens=24)
    run.seen["cached_answer"] = [
        cached - length
        for cached, length in zip(run.seen["cached_tokens"], lengths * 2, strict=True)
    ]
    return [first, second]


def constrained_beside_free(run: Run) -> Any:
    """Requests that need chains, and free ones, take turns in the same slots."""
    from vllm.sampling_params import StructuredOutputsParams as Structured

    rules = [
        {"repetition_penalty": 1.3},
        {},
        {"structured_outputs": Structured(regex="(ab|cd|[x-z]{3}){12}"), "ignore_eos": False},
        {"logprobs": 2},
        {"bad_words": ["a", "e", "i", "o", "u"]},
        {"min_tokens": 20, "stop": ["a", "b", "c", "d", "e"]},
        {"presence_penalty": 1.0},
        {},
    ]
    prompts = [run.prompt(f"{i} {{}} go on", 40 + i % 3) for i in range(16)]
    lengths = [5 + 4 * (i % 7) for i in range(16)]
    return run.ask(
        prompts,
        [greedy(max_tokens=n, **rules[i % len(rules)]) for i, n in enumerate(lengths)],
    )


def aborts_and_arrivals(run: Run) -> Any:
    """A small workload in which every second request is aborted; its slots are taken over."""
    return _served(run, workload.random_requests(16, seed=5, longest=32, abort=0.5))


def seeded_samples(run: Run) -> Any:
    """Sampled with seeds: under Model Runner V2 the noise does not depend on speculation."""
    use_torch_top_p()
    prompts = [run.prompt("{} once", 1), run.prompt("twice"), run.prompt("{} {}", 2, 3)]
    settings = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.95},
        {"temperature": 2.0, "top_k": 20},
    ]
    return run.ask(prompts, [greedy(max_tokens=24, seed=i, **s) for i, s in enumerate(settings, 3)])


def _served(run: Run, requests: list[workload.Request]) -> Any:
    answers = workload.serve(run.engine, run.kind, requests, concurrency=9)
    # Of an aborted request, only what the other run saw as well can be compared.
    expected = run.shared.setdefault("answers", answers)
    return workload.mismatches(requests, expected, answers)


TREE_CASES: dict[str, Callable[[Run], Any]] = {
    case.__name__: case
    for case in (
        cut_trees, ends_of_context, settled_prefixes, constrained_beside_free, aborts_and_arrivals,
        seeded_samples,
    )
}  # fmt: skip
ALL_CASES = {**CASES, **TREE_CASES}


def tree_identity(
    *,
    runner: str,
    kind: str,
    target: str,
    draft: str,
    cases: list[str],
    mutations: dict[str, str] | None = None,
    schedule: list[list[int]] | None = None,
    requests_at_once: int | None = None,
) -> dict[str, Any]:
    """Run cases without speculation and with trees; then some with the plugin broken.

    Args:
        runner: ``v1`` or ``v2``.
        kind: of the tiny pair.
        target, draft: its folders.
        cases: names in ``ALL_CASES``.
        mutations: names in ``tree_mutations``, and for each the case (among ``cases``) to run.
        schedule: nodes by batch size, see `open_engine`.
        requests_at_once: run the first case once more, drafting for so many requests at a time.

    Returns:
        `chain_identity.check_case` and `tree_mutations.Seen` for each case under ``cases``, and for
        the first one drafted in turn under ``in_turn``; under
        ``mutations`` whether the case still gave the same, or the error that it ended with; the
        blocks still in use at the end.
    """
    started = time.perf_counter()
    chosen = {name: ALL_CASES[name] for name in cases}
    expected, shared = answers_of_plain_engine(target, kind, runner, chosen)
    engine = open_engine(
        target, draft, NODES, tree=(DEPTH, TOP_K), schedule=schedule, **engine_options(kind)
    )
    require_runner(engine, runner)
    broken, in_turn = {}, None
    with watched_acceptance() as seen:

        def checked(name: str) -> dict[str, Any]:
            run = Run(engine, kind, shared[name])
            return {**check_case(run, chosen[name], expected[name]), **seen.report()}

        results = {name: checked(name) for name in chosen}
        if requests_at_once is not None:
            engine.reset_prefix_cache()
            drafter = engine.llm_engine.model_executor.driver_worker.worker.model_runner.drafter
            with mock.patch.object(drafter, "requests_at_once", requests_at_once):
                in_turn = checked(cases[0])
    used_blocks = workload.used_blocks(engine)
    total = counted(acceptance(engine))
    for mutation, name in (mutations or {}).items():
        engine.reset_prefix_cache()
        with mutated(runner, mutation):
            broken[mutation] = check_case(
                Run(engine, kind, shared[name]), chosen[name], expected[name]
            )
    return {
        "cases": results,
        "in_turn": in_turn,
        "mutations": broken,
        "total": total,
        "replays": replays(engine),
        "used_blocks": used_blocks,
        "seconds": round(time.perf_counter() - started, 1),
    }


def random_identity(
    *,
    runner: str,
    kind: str,
    target: str,
    draft: str,
    requests: int,
    seed: int,
    longest: int,
    concurrency: int = 10,
    cache_blocks: int | None = None,
    sampled: bool = False,
    async_scheduling: bool = False,
    show_progress: bool = False,
) -> dict[str, Any]:
    """A random workload without speculation and with trees: the requests whose answers differ.

    Args:
        runner, kind, target, draft: as for `tree_identity`.
        requests, seed, longest: of `workload.random_requests`.
        concurrency: requests inside the engine at a time.
        cache_blocks: of the KV cache, in the place of ``engine_options``'s; the fewer, the more
            preemptions.
        sampled: `workload.sampled_requests` instead.
        async_scheduling: force it on where trees are drafted.
        show_progress: draw a bar on standard error.
    """
    if runner == "v2":
        use_torch_top_p()
    options = engine_options(kind)
    if cache_blocks is not None:
        options["num_gpu_blocks_override"] = cache_blocks
    if sampled:
        asked = workload.sampled_requests(requests, seed, longest)
    else:
        asked = workload.random_requests(requests, seed, longest, seeded=runner == "v2")
    return served_both_ways(
        asked, runner=runner, kind=kind, target=target, draft=draft, seed=seed,
        concurrency=concurrency, options=options, async_scheduling=async_scheduling,
        show_progress=show_progress,
    )  # fmt: skip


def served_both_ways(
    asked: list[workload.Request],
    *,
    runner: str,
    kind: str,
    target: str,
    draft: str,
    seed: int,
    concurrency: int,
    options: dict[str, Any],
    async_scheduling: bool = False,
    show_progress: bool = False,
    watch: Callable[[str, Any], Callable[..., None]] | None = None,
) -> dict[str, Any]:
    """Serve a workload without speculation and then with trees; how the answers differ.

    Args:
        asked: the workload.
        runner, kind, target, draft, concurrency, async_scheduling, show_progress: as for
            `random_identity`.
        seed: of the order in which requests come.
        options: of both engines.
        watch: called with ``plain`` or ``trees`` and the engine, gives what `workload.serve` is to
            call after every step.
    """
    started = time.perf_counter()

    def answers(name: str, engine: Any) -> dict[str, workload.Answer]:
        require_runner(engine, runner)
        watcher = watch(name, engine) if watch else None
        label = {"plain": "no speculation"}.get(name, name)
        with workload.progress_bar(label, len(asked), show_progress) as show:

            def on_step(done: dict[str, workload.Answer]) -> None:
                show(done)
                if watcher is not None:
                    watcher(done)

            return workload.serve(engine, kind, asked, concurrency, seed, on_step)

    with pictures_kept_for_resumption(), running_engine(target, None, **options) as plain:
        expected = answers("plain", plain)
    with (
        pictures_kept_for_resumption(),
        forced_async_scheduling() if async_scheduling else nullcontext(),
        running_engine(target, draft, NODES, tree=(DEPTH, TOP_K), **options) as engine,
        watched_acceptance() as seen,
    ):
        got = answers("trees", engine)
        return {
            "runner": runner,
            "kind": kind,
            "scheduler": type(scheduler_of(engine)).__name__,
            "requests": len(asked),
            "concurrency": concurrency,
            "aborted": sum(answer.aborted for answer in got.values()),
            "images": sum(len(request.images) for request in asked),
            "tokens": sum(len(ids) for a in got.values() for ids, *_ in a.samples),
            "mismatches": workload.mismatches(asked, expected, got),
            "preemptions": Run(engine, kind, {}).metric("vllm:num_preemptions"),
            "used_blocks": workload.used_blocks(engine),
            **counted(acceptance(engine)),
            **seen.report(),
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time(), 1),
        }
