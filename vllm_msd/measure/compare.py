"""The same requests with and without drafts, in turn on the same cores, and their figures."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vllm_msd.measure.engine import Answer, Drafting, Engine
from vllm_msd.measure.inputs import Pair, Sample, warm_up_of

# The name of the engine without a draft among the engines compared.
PLAIN = "plain"


@dataclass
class Comparison:
    """One request's answers by engine: the first round's in full, every round's decode times.

    ``timings`` holds, per round and engine, decode tokens and seconds.
    """

    sample: Sample
    answers: dict[str, Answer]
    timings: list[dict[str, tuple[int, float]]] = field(default_factory=list)

    @property
    def plain(self) -> Answer:
        """The answer without a draft."""
        return self.answers[PLAIN]

    @property
    def drafted(self) -> dict[str, Answer]:
        """The answers with drafts, by engine."""
        return {name: answer for name, answer in self.answers.items() if name != PLAIN}

    def identical(self, name: str) -> bool:
        """Whether engine ``name`` gave the token ids that the target gives without a draft."""
        return self.answers[name].token_ids == self.plain.token_ids


def compare(
    pair: Pair,
    samples: Sequence[Sample],
    draftings: Mapping[str, Drafting],
    *,
    dtype: str,
    max_tokens: int = 192,
    rounds: int = 1,
    on_start: Callable[[], None] = lambda: None,
    on_answer: Callable[[Comparison], None] = lambda comparison: None,
    share_weights: bool = False,
    drafts: Mapping[str, Path] | None = None,
    **engine_options: Any,
) -> list[Comparison]:
    """Answer every sample without a draft and with each drafting, one request at a time.

    Who goes first rotates from request to request and from round to round, so a machine that slows
    down or speeds up in between favours none. ``on_start`` is called when all engines are up and
    warm, ``on_answer`` after each comparison, in every round. With ``share_weights`` (on a CPU) the
    engines hold the target once. ``drafts`` names other drafts than the pair's, by drafting.
    """
    drafts = drafts or {}
    engines = {PLAIN: Engine(pair.target, dtype=dtype, **engine_options)}
    for name, drafting in draftings.items():
        engines[name] = Engine(
            pair.target,
            draft=drafts.get(name, pair.draft),
            drafting=drafting,
            dtype=dtype,
            **engine_options,
        )
        if share_weights:
            engines[name].share_target(engines[PLAIN])
    for engine in engines.values():  # the first request pays for lazy set-up
        engine.answer(warm_up_of(samples), 16)
    on_start()
    names = list(engines)
    comparisons: list[Comparison] = []
    for round_index in range(rounds):
        for index, one in enumerate(samples):
            first = (round_index + index) % len(names)
            answers = {
                name: engines[name].answer(one, max_tokens)
                for name in names[first:] + names[:first]
            }
            if round_index == 0:
                comparisons.append(Comparison(one, {name: answers[name] for name in names}))
            comparisons[index].timings.append(
                {name: (a.decode_tokens, a.decode_seconds) for name, a in answers.items()}
            )
            on_answer(comparisons[index])
    return comparisons


def by_kind(comparisons: Iterable[Any]) -> dict[str, list[Any]]:
    """What has a ``sample``, by its kind, in order of appearance."""
    groups: dict[str, list[Any]] = {}
    for one in comparisons:
        groups.setdefault(one.sample.kind, []).append(one)
    return groups


def acceptance(answers: Iterable[Answer]) -> dict[str, Any]:
    """Acceptance over all verifications of these answers, see `acceptance_figures`."""
    answers = list(answers)
    return acceptance_figures(
        sum(a.num_drafts for a in answers),
        sum(a.num_draft_tokens for a in answers),
        sum(a.num_accepted_tokens for a in answers),
        [a.accepted_per_position for a in answers],
    )


def acceptance_figures(
    verifications: int, drafted: int, accepted: int, by_position: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """``acceptance_length`` is tokens per verification.

    The target's own token (the bonus) counts, so 1 means that no draft was ever accepted.

    Args:
        verifications, drafted, accepted: their number, and tokens.
        by_position: verifications that accepted a token at position 1, 2, ..., of each part; one
            without any may be shorter.
    """
    counts = [sum(column) for column in zip_longest(*by_position, fillvalue=0)]
    return {
        "verifications": verifications,
        "drafted": drafted,
        "accepted": accepted,
        "acceptance_length": 1 + accepted / verifications if verifications else None,
        "acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_rate_per_position": [n / verifications for n in counts if verifications],
    }


def rates(comparisons: Sequence[Comparison], name: str) -> list[float | None]:
    """Decode tokens per second of one engine in each round."""
    return [
        _rate(c.timings[index][name] for c in comparisons)
        for index in range(len(comparisons[0].timings))
    ]


def _rate(timings: Iterable[tuple[int, float]]) -> float | None:
    tokens, seconds = (sum(column) for column in zip(*timings, strict=True))
    return tokens / seconds if seconds else None


def speed(comparisons: Sequence[Comparison], name: str) -> dict[str, Any]:
    """Decode tokens per second at batch 1 without a draft and with ``name``'s, and their ratio.

    ``speedup`` is the median of the rounds' ratios, so that other work on the machine during one of
    them does not decide it. ``median_step_seconds`` is the cost of one engine step, first round.
    """
    rounds = [
        msd / plain if plain and msd else None
        for plain, msd in zip(rates(comparisons, PLAIN), rates(comparisons, name), strict=True)
    ]
    overall = {n: _rate(t[n] for c in comparisons for t in c.timings) for n in (PLAIN, name)}
    answers = {
        "plain": [c.plain for c in comparisons],
        "msd": [c.answers[name] for c in comparisons],
    }
    ratios = [ratio for ratio in rounds if ratio is not None]
    return {
        "plain_tokens_per_second": overall[PLAIN],
        "msd_tokens_per_second": overall[name],
        "speedup": statistics.median(ratios) if ratios else None,
        "speedup_per_round": rounds,
        "median_step_seconds": {key: _median_step(group) for key, group in answers.items()},
        "median_first_token_seconds": {
            key: statistics.median(a.prefill_seconds for a in group)
            for key, group in answers.items()
        },
    }


def _median_step(answers: Iterable[Answer]) -> float | None:
    steps = [
        later[1] - earlier[1]
        for answer in answers
        for earlier, later in zip(answer.steps, answer.steps[1:], strict=False)
    ]
    return statistics.median(steps) if steps else None


def figures(comparisons: Sequence[Comparison], name: str) -> dict[str, Any]:
    """All figures of engine ``name``, over everything, over image requests, and by kind."""
    groups = by_kind(comparisons)
    images = [c for c in comparisons if c.sample.images]

    def accepted(group: Iterable[Comparison]) -> dict[str, Any]:
        return acceptance(c.answers[name] for c in group)

    return {
        "requests": len(comparisons),
        "identical": sum(c.identical(name) for c in comparisons),
        "tokens": sum(len(c.answers[name].token_ids) for c in comparisons),
        "all": accepted(comparisons),
        "multimodal": accepted(images),
        "by_kind": {kind: accepted(group) for kind, group in groups.items()},
        "speed": speed(comparisons, name),
        "speed_by_kind": {kind: speed(group, name) for kind, group in groups.items()},
    }
