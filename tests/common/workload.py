"""Random mixed workloads: seeded requests of every kind, and the loop that serves them.

Greedy decoding (and sampling with one possible outcome) with every feature that has one right
answer, prompts with 0 to 3 images that share prefixes and pictures, lengths from a few tokens to
the end of the context, and requests that are aborted while they wait, in their prefill or between
two verifications. Whatever is asked, the answers must not depend on speculation.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count as counter
from typing import Any

from tests.common import tiny
from tests.common.fp32_engine import scheduler_of

PREFIXES = (
    "",
    "tell me: ",
    "a prefix of text that fills more than one block, so that it can be found again. ",
    "{} what is to be seen here? ",
    "another prefix, which is longer than a block as well: {} and then ",
)
WORDS = (
    *("how", "what", "red", "blue", "small", "large", "and", "is"),
    *("are", "this", "that", "here", "there", "story", "again", "why"),
)
PICTURES = 6  # few, so that pictures come back in other requests


@dataclass(frozen=True)
class Request:
    """One request as plain data.

    ``text`` has a ``{}`` for each of the ``images`` (seeds of `tiny.image`). ``settings`` are
    arguments of `SamplingParams`; ``structured`` those of its structured output. The request is
    aborted once ``abort_after`` tokens are out; 0: while it waits or is prefilled.
    """

    name: str
    text: str
    images: tuple[int, ...]
    settings: dict[str, Any]
    structured: dict[str, Any] | None = None
    abort_after: int | None = None

    def prompt(self, kind: str) -> dict[str, Any]:
        """The request as vLLM takes it, for a target of this kind."""
        return tiny.prompt(kind, self.text, [tiny.picture(kind, seed) for seed in self.images])

    def params(self) -> Any:
        """Its sampling parameters."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True} | self.settings)
        if self.structured is not None:
            params.structured_outputs = StructuredOutputsParams(**self.structured)
            params.ignore_eos = False
        # Samples of one request come together; what is aborted is watched token by token.
        watched = self.abort_after is not None
        params.output_kind = RequestOutputKind[("FINAL_ONLY", "CUMULATIVE")[watched]]
        return params


def _features(rng: random.Random, tokens: int) -> list[tuple[dict, dict | None]]:
    """One of each feature: settings and structured output."""
    letters = [chr(c) for c in range(97, 123)]
    some = rng.sample(letters, 12)
    return [
        ({"logprobs": 3}, None),
        ({"temperature": 1.0, "top_k": 1, "n": 2}, None),
        ({"repetition_penalty": 1.4}, None),
        ({"presence_penalty": 1.2, "frequency_penalty": 0.6}, None),
        ({"bad_words": some[:6]}, None),
        ({"stop": [some[0], some[1]]}, None),
        ({"stop": some, "min_tokens": tokens // 2}, None),
        ({"allowed_token_ids": sorted(rng.sample(range(20, 200), 90))}, None),
        ({}, {"regex": "(ab|cd|[x-z]{3}){6}"}),
        ({}, {"choice": ["a long answer to choose", "b is shorter"]}),
        ({}, {"json": {"type": "object", "properties": {"n": {"enum": [1, 25]}},
                       "required": ["n"]}}),
    ]  # fmt: skip


def random_requests(
    count: int,
    seed: int,
    longest: int = 60,
    context: int = 320,
    seeded: bool = False,
    abort: float = 0.1,
) -> list[Request]:
    """``count`` requests; the same ones for the same arguments.

    Args:
        count: how many.
        seed: of the generator.
        longest: output tokens of the longest, but for a few that run to the end of the context.
        context: ``max_model_len`` of the engine. A picture counts as 40 tokens at most.
        seeded: also sampled requests with a seed of their own, whose text Model Runner V2 promises
            not to change under speculation.
        abort: share of requests that are aborted.
    """
    rng = random.Random(seed)
    requests = []
    for index in range(count):
        tokens = rng.randint(1, longest)
        text, images = rng.choice(PREFIXES), rng.choice((0, 0, 0, 1, 1, 2))
        for _ in range(rng.randint(1, 14)):
            text += rng.choice(WORDS) + rng.choice((" ", " ", ", ", "? "))
            if images and rng.random() < 0.4:
                text, images = text + "{} ", images - 1
        pictures = tuple(rng.randrange(PICTURES) for _ in range(text.count("{}")))
        settings, structured, abort_after = {}, None, None
        room = context - len(text) - 40 * len(pictures)
        if rng.random() < 0.04:  # into the end of the context
            text += "x" * (room - 8 - rng.randrange(8))
            tokens = context
        elif rng.random() < 0.5:
            settings, structured = rng.choice(_features(rng, tokens))
        elif seeded and rng.random() < 0.5:
            settings = {"temperature": rng.choice((0.7, 1.0)), "seed": rng.randrange(10**6)}
        if "n" not in settings and rng.random() < abort:
            abort_after = rng.choice((0, rng.randint(1, tokens)))
        settings = {"max_tokens": tokens, **settings}
        requests.append(
            Request(f"r{index}", text, pictures, settings, structured, abort_after)
        )  # fmt: skip
    return requests


def sampled_requests(count: int, seed: int, longest: int = 60) -> list[Request]:
    """As `random_requests`, but each is sampled with a seed of its own and none is aborted."""
    rng = random.Random(seed + 1)
    warps = ({}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"top_p": 0.95, "top_k": 40})
    return [
        replace(
            request,
            settings={
                "max_tokens": request.settings["max_tokens"],
                "temperature": rng.choice((0.7, 1.0, 1.5)),
                "seed": rng.randrange(10**6),
                **rng.choice(warps),
            },
            structured=None,
        )
        for request in random_requests(count, seed, longest, abort=0.0)
    ]


@dataclass(frozen=True)
class Answer:
    """Token ids and the reason of the end of each sample; what was out before an abort."""

    samples: list[tuple[list[int], str | None, Any]]
    aborted: bool = False


def serve(
    engine: Any,
    kind: str,
    requests: Sequence[Request],
    concurrency: int,
    seed: int = 0,
    on_step: Callable[[dict[str, Answer]], None] | None = None,
) -> dict[str, Answer]:
    """Serve the requests, at most ``concurrency`` at a time, joining at random steps.

    Args:
        engine: an in-process ``vllm.LLM``.
        kind: of the tiny target.
        requests: in the order of their arrival.
        concurrency: requests inside the engine, waiting ones included.
        seed: of the arrivals.
        on_step: called after each engine step with the answers that are complete.
    """
    core, rng = engine.llm_engine, random.Random(seed)
    queue, inside = deque(requests), {}
    answers: dict[str, Answer] = {}

    def finish(name: str, samples: list, aborted: bool = False) -> None:
        answers[name] = Answer(samples, aborted)
        del inside[name]

    for _ in counter():
        while queue and len(inside) < concurrency and (not inside or rng.random() < 0.6):
            request = queue.popleft()
            core.add_request(request.name, request.prompt(kind), request.params())
            inside[request.name] = request
        if not inside:
            return answers
        for output in core.step():
            request = inside[output.request_id]
            samples = [
                (list(one.token_ids), one.finish_reason, one.stop_reason)
                for one in sorted(output.outputs, key=lambda one: one.index)
            ]
            if output.finished:
                finish(request.name, samples)
            elif request.abort_after and len(samples[0][0]) >= request.abort_after:
                core.abort_request([request.name])
                finish(request.name, samples, aborted=True)
        for request in list(inside.values()):
            if request.abort_after == 0 and rng.random() < 0.4:
                core.abort_request([request.name])
                finish(request.name, [([], None, None)], aborted=True)
        if on_step is not None:
            on_step(answers)


@contextmanager
def progress_bar(
    label: str, total: int, shown: bool
) -> Iterator[Callable[[dict[str, Answer]], None]]:
    """An ``on_step`` for `serve` that moves a bar on standard error, if it is to be shown."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, mininterval=10, disable=not shown, file=sys.stderr) as bar:
        yield lambda answers: bar.update(len(answers) - bar.n)


def mismatches(
    requests: Sequence[Request], expected: dict[str, Answer], got: dict[str, Answer]
) -> list[dict[str, Any]]:
    """Requests whose answers differ; of aborted ones, the tokens that both runs saw must agree."""
    found = []
    for request in requests:
        want, have = expected[request.name], got[request.name]
        if want.aborted or have.aborted:
            pairs = zip(want.samples[0][0], have.samples[0][0], strict=False)
            same = all(a == b for a, b in pairs)
        else:
            same = want.samples == have.samples
        if not same:
            found.append(
                {
                    "request": request.name,
                    "settings": request.settings,
                    "structured": request.structured,
                    "images": len(request.images),
                    "expected": want.samples,
                    "got": have.samples,
                }
            )
    return found


def used_blocks(engine: Any) -> int:
    """KV cache blocks that some request holds; 0 once all have gone."""
    pool = scheduler_of(engine).kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one block is never given out
