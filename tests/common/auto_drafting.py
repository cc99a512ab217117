"""An engine that chooses its sizes, against one without speculation, in one process.

The budget is tried as it is, with costs that change, and with a chooser that drafts by a script:
whatever is drafted, answers must be those of no speculation.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from itertools import cycle
from typing import Any

from tests.common import tiny
from tests.common.chain_identity import engine_options, greedy, require_runner
from tests.common.drafting_world import costs
from tests.common.fp32_engine import acceptance, counted, running_engine

KIND = "llava"
# Depths by a script: all, none for some steps, less, none again, ...
SCRIPT = (8, 0, 0, 0, 8, 2, 0, 8, 1, 0, 0, 0, 0, 0, 3)


class ScriptedDepth:
    """Stands in for the depth chooser."""

    def __init__(self, depths: tuple[int, ...], most: int) -> None:
        self._depths, self._most = cycle(depths), most

    def next(self, requests: int, costs: Any) -> Any:
        from vllm_msd.budget import DraftPlan

        return DraftPlan(min(next(self._depths), self._most))

    def drafted(self, *_: Any) -> None:
        """Nothing is learned."""

    def probed(self, *_: Any) -> None:
        """There are no probes."""


def drafter_of(engine: Any) -> Any:
    core = engine.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.drafter


class Watch:
    """Notes what a drafter proposes: depths, sizes, and tokens by what stands before them."""

    def __init__(self, drafter: Any) -> None:
        self.depths: list[int] = []
        self.sizes: Counter[int] = Counter()
        self.first_tokens: dict[tuple[str, int], int] = {}
        self._propose = drafter.propose
        self._drafter = drafter
        drafter.propose = self.propose

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        proposed = self._propose(*args, **kwargs)
        drafter = self._drafter
        batch = drafter.runner.input_batch
        self.depths.append(drafter.plan.depth)
        last_rows = kwargs["token_indices_to_sample"]
        if last_rows is None:
            last_rows = kwargs["common_attn_metadata"].query_start_loc[1:] - 1
        positions = drafter.runner.positions[last_rows].tolist()
        for request, tokens in enumerate(proposed):
            self.sizes[len(tokens)] += 1
            if tokens and drafter.limits[request]:
                prompt = int(batch.num_prompt_tokens[request])
                self.first_tokens[prompt, positions[request]] = tokens[0]
        return proposed

    def take(self) -> dict[str, Any]:
        """What was noted since the last call."""
        noted = {"depths": self.depths, "sizes": dict(self.sizes), "tokens": self.first_tokens}
        self.depths, self.sizes, self.first_tokens = [], Counter(), {}
        return noted


def answers(engine: Any) -> dict[str, Any]:
    """Greedy, constrained and seeded requests, with and without images, in two batches."""
    from vllm import SamplingParams

    pictures = [tiny.picture(KIND, seed) for seed in (1, 2, 3)]
    prompts = [
        tiny.prompt(KIND, "{} what is it?", pictures[:1]),
        tiny.prompt(KIND, "a request without an image that is long enough to be cut in chunks"),
        tiny.prompt(KIND, "hello"),
        tiny.prompt(KIND, "look at {} and at {}, too", pictures[1:]),
    ]
    seeded = [
        SamplingParams(
            temperature=0.9, top_p=0.9, max_tokens=24, ignore_eos=True, seed=seed, logprobs=seed
        )
        for seed in range(len(prompts))
    ]
    constrained = greedy(max_tokens=20, repetition_penalty=1.1)
    asked = {
        "greedy": ([*prompts, prompts[0]], [greedy(max_tokens=36)] * 4 + [constrained]),
        "seeded": (prompts, seeded),
    }
    return {
        name: [
            [
                list(output.outputs[0].token_ids),
                [sorted(likeliest) for likeliest in output.outputs[0].logprobs or ()],
            ]
            for output in engine.generate(*requests, use_tqdm=False)
        ]
        for name, requests in asked.items()
    }


def one_by_one(engine: Any, tokens: int) -> list[list[int]]:
    """Two greedy requests, each alone."""
    prompts = [tiny.prompt(KIND, text) for text in ("hello", "tell a story")]
    return [
        list(
            engine.generate([p], greedy(max_tokens=tokens), use_tqdm=False)[0].outputs[0].token_ids
        )
        for p in prompts
    ]


def auto_drafting(runner: str, target: str, draft: str, wrong_draft: str) -> dict[str, Any]:
    """What `tests/vllm/test_auto.py` reads."""
    os.environ["VLLM_CACHE_ROOT"] = tempfile.mkdtemp()
    options = engine_options(KIND)
    with running_engine(target, None, **options) as engine:
        require_runner(engine, runner)
        plain, plain_alone = answers(engine), one_by_one(engine, 100)
    report: dict[str, Any] = {"cases": {}}

    def case(name: str, engine: Any, watch: Watch) -> None:
        before = acceptance(engine)
        same = answers(engine) == plain
        noted = watch.take()
        noted.pop("tokens")
        report["cases"][name] = {"same": same, **counted(acceptance(engine) - before), **noted}

    config = {"method": "msd", "model": draft}
    with running_engine(target, None, **options, speculative_config=config) as engine:
        require_runner(engine, runner)
        drafter = drafter_of(engine)
        report["points"] = len(drafter.tables[drafter.config].step)
        report["drawing"] = dict(drafter.tables[drafter.config].drawing)
        report["left_over"] = len(drafter.runner.requests) + drafter.backlog.num_rows
        watch = Watch(drafter)
        case("as measured", engine, watch)
        chain, tree = drafter.shapes[-1], drafter.shapes[0]
        for name, shape in (("chain", chain), ("tree", tree)):
            cheap = costs(0.1, 0.001, 0.0002, 0.004, 0.004)
            drafter.use(shape, cheap)
            case(f"{name}, cheap rows", engine, watch)
            drafter.use(shape, costs(0.002, 0.001, 0.3, 0.004, 0.1))
            case(f"{name}, dear rows", engine, watch)
            drafter.use(shape, cheap)
            drafter.chooser = ScriptedDepth((8,), shape.depth)
            one_by_one(engine, 40)
            always = watch.take()["tokens"]
            drafter.chooser = ScriptedDepth(SCRIPT, shape.depth)
            case(f"{name}, by a script", engine, watch)
            one_by_one(engine, 40)
            sometimes = watch.take()["tokens"]
            both = always.keys() & sometimes.keys()
            report["cases"][f"{name}, by a script"] |= {
                "drafted_in_both": len(both),
                "drafted_alike": sum(always[place] == sometimes[place] for place in both),
            }
        # A request is forgotten in the step after its last.
        owing = drafter.backlog._owed.keys() - drafter.runner.requests.keys()
        report["owed_by_finished"] = len(owing)

    config = {"method": "msd", "model": wrong_draft, "num_speculative_tokens": "auto"}
    with running_engine(target, None, **options, speculative_config=config) as engine:
        watch = Watch(drafter_of(engine))
        before = acceptance(engine)
        same = one_by_one(engine, 100) == plain_alone
        noted = watch.take()
        report["wrong"] = {
            "same": same,
            **counted(acceptance(engine) - before),
            "drafting_steps": sum(depth > 0 for depth in noted["depths"][50:]),
            "steps": len(noted["depths"][50:]),
        }
    return report
