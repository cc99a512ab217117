"""Greedy identity: real vLLM with and without MSD on the same requests, token for token.

Used by ``tests/vllm/test_lossless_greedy.py`` and ``tests/long/lossless.py``, through
``tests.common.worker``. Not covered: compiled kernels and CUDA graphs (all of this runs eagerly).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from tests.common import features
from tests.common.fp32_engine import acceptance, counted, runner_of, running_engine
from tests.common.wrong_rules import accept_every_draft

SEVERAL_IMAGES = "several images"


@dataclass(frozen=True)
class Request:
    """One greedy request: a rendered chat prompt, its images in order, and how far to decode."""

    kind: str
    prompt: str
    images: tuple[Any, ...]
    max_tokens: int

    def for_vllm(self) -> dict[str, Any]:
        """The request as ``LLM.generate`` takes it."""
        media = {"multi_modal_data": {"image": list(self.images)}} if self.images else {}
        return {"prompt": self.prompt, **media}


def demo_requests(target: str, count: int, lengths: Sequence[int], seed: int) -> list[Request]:
    """Held-out requests of the demo world: every kind in turn, and prompts with 2 or 3 images.

    Args:
        target: folder of the target, whose processor renders the chats.
        count: how many.
        lengths: ``max_tokens`` of the first, second, ... request, repeated as needed.
        seed: first seed of the world's sampler.
    """
    from transformers import AutoProcessor

    from demo_factory.world import KINDS, sample

    processor = AutoProcessor.from_pretrained(target)
    with_image = [kind for kind in KINDS if kind != "text"]
    kinds = [*KINDS, SEVERAL_IMAGES]
    requests = []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        if kind == SEVERAL_IMAGES:
            turn = index // len(kinds)
            parts = [
                sample(with_image[(turn + i) % len(with_image)], seed + index + i, "test")
                for i in range(2 + turn % 2)
            ]
        else:
            parts = [sample(kind, seed + index, "test")]
        images = tuple(image for part in parts for image in part.images)
        messages = [message for part in parts for message in part.messages][:-1]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        requests.append(Request(kind, prompt, images, lengths[index % len(lengths)]))
    return requests


def real_requests(target: str, count: int, lengths: Sequence[int], seed: int) -> list[Request]:
    """The prompts that come with the real pair: as they are, then with 1, 2 and 3 drawn pictures.

    Arguments are those of `demo_requests`.
    """
    from transformers import AutoProcessor

    from demo_factory.world import sample
    from vllm_msd.demo.real.pair import real_samples

    processor = AutoProcessor.from_pretrained(target)
    asked = real_samples()
    requests = []
    for index in range(count):
        one, several = asked[index % len(asked)], index // len(asked) % 4
        pictures = [sample("vqa", seed + index * 4 + i, "test").images[0] for i in range(several)]
        parts = [{"type": "image"}] * several + one.prompt[0]["content"]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )
        kind = (
            SEVERAL_IMAGES if several > 1 else f"{one.kind} and an image" if several else one.kind
        )
        requests.append(Request(kind, prompt, tuple(pictures), lengths[index % len(lengths)]))
    return requests


@dataclass(frozen=True)
class Greedy:
    """One greedy answer; ``gaps[i]`` is the logprob gap of the two best tokens at position i."""

    ids: list[int]
    text: str
    finish: str | None
    gaps: list[float] = field(default_factory=list)


def answer(engine: Any, requests: Sequence[Request], *, alone: bool, gaps: bool) -> list[Greedy]:
    """Greedy answers, one request at a time (``alone``) or all in one call."""
    from vllm import SamplingParams

    prompts = [request.for_vllm() for request in requests]
    params = [
        SamplingParams(temperature=0.0, max_tokens=request.max_tokens, logprobs=2 if gaps else None)
        for request in requests
    ]
    if alone:
        outputs = [
            engine.generate([prompt], [param], use_tqdm=False)[0]
            for prompt, param in zip(prompts, params, strict=True)
        ]
    else:
        outputs = engine.generate(prompts, params, use_tqdm=False)
    answers = []
    for output in outputs:
        best = output.outputs[0]
        margins = []
        for candidates in best.logprobs or []:
            first, second = sorted((c.logprob for c in candidates.values()), reverse=True)[:2]
            margins.append(first - second)
        answers.append(Greedy(list(best.token_ids), best.text, best.finish_reason, margins))
    return answers


@dataclass(frozen=True)
class Mismatch:
    """The first position at which a request's answer differs, and how close the choice was."""

    request: int
    kind: str
    position: int
    expected: str
    got: str
    top2_gap: float | None


def differences(
    requests: Sequence[Request], expected: Sequence[Greedy], got: Sequence[Greedy]
) -> list[Mismatch]:
    """Every request whose token ids or finish reason differ."""
    found = []
    for index, (request, want, have) in enumerate(zip(requests, expected, got, strict=True)):
        if (want.ids, want.finish) == (have.ids, have.finish):
            continue
        pairs = zip(want.ids, have.ids, strict=False)
        shorter = min(len(want.ids), len(have.ids))
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
        gap = want.gaps[position] if position < len(want.gaps) else None
        found.append(Mismatch(index, request.kind, position, want.text, have.text, gap))
    return found


def greedy_identity(
    *,
    runner: str,
    target: str,
    draft: str,
    requests: int,
    alone: int,
    lengths: Sequence[int],
    seed: int,
    spec_tokens: int = 5,
    real: bool = False,
) -> dict[str, Any]:
    """Compare MSD with no speculation: ``requests`` in mixed batches, the first ``alone`` of them
    one at a time too, and a batch in which every request uses another feature.

    They are `demo_requests`, or of the ``real`` pair `real_requests`. The last figure, ``broken``,
    shows that the comparison can fail: the number of requests that change when a wrong rule accepts
    every draft.
    """
    wanted = (real_requests if real else demo_requests)(target, requests, lengths, seed)
    probe = min(16, requests)

    started = time.perf_counter()
    with running_engine(target, None) as plain:
        expected = answer(plain, wanted, alone=False, gaps=True)
        words = ordinary_words(expected)
        params = features.feature_params(min(24, max(lengths)), words)
        media = [request.for_vllm() for request in wanted]
        expected_features = features.ask(plain, media, params)
        used = {runner_of(plain)}

    with running_engine(target, draft, spec_tokens) as engine:
        used.add(runner_of(engine))
        if used != {runner}:
            raise RuntimeError(f"wanted model runner {runner}, vLLM uses {sorted(used)}")
        readings = [acceptance(engine)]
        mixed = differences(wanted, expected, answer(engine, wanted, alone=False, gaps=False))
        readings.append(acceptance(engine))
        single = differences(
            wanted[:alone],
            expected[:alone],
            answer(engine, wanted[:alone], alone=True, gaps=False),
        )
        readings.append(acceptance(engine))
        changed = features.differences(expected_features, features.ask(engine, media, params))
        readings.append(acceptance(engine))
        with accept_every_draft(runner):
            broken = differences(
                wanted[:probe],
                expected[:probe],
                answer(engine, wanted[:probe], alone=False, gaps=False),
            )
    counts = [counted(now - then) for then, now in pairwise(readings)]
    return {
        "runner": runner,
        "requests": len(wanted),
        "requests_per_kind": {k: sum(r.kind == k for r in wanted) for k in kinds_of(wanted)},
        "tokens": sum(len(a.ids) for a in expected),
        "smallest_top2_gap": min(gap for a in expected for gap in a.gaps),
        "mixed": {**counts[0], "mismatches": [asdict(m) for m in mixed]},
        "alone": {
            "requests": alone,
            **counts[1],
            "mismatches": [asdict(m) for m in single],
        },
        "features": {
            "asked": {name: a["samples"][0][1] for name, a in expected_features.items()},
            "words": words,
            **counts[2],
            "changed": changed,
        },
        "broken": {"requests": probe, "changed": len(broken)},
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
    }


def kinds_of(requests: Sequence[Request]) -> list[str]:
    """The kinds that occur, in order of appearance."""
    return list(dict.fromkeys(request.kind for request in requests))


def ordinary_words(answers: Sequence[Greedy]) -> list[str]:
    """Two words that many answers hold, the most frequent first."""
    counts: dict[str, int] = {}
    for one in answers:
        for word in set(one.text.split()[1:]):
            if len(word) > 1:
                counts[word] = counts.get(word, 0) + 1
    return sorted(counts, key=lambda word: (-counts[word], word))[:2]
