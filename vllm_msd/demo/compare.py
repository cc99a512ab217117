"""The same requests with and without MSD, in turn on the same cores, and the figures from that."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_msd.demo.engine import Answer, Engine
from vllm_msd.demo.paths import DemoPaths
from vllm_msd.demo.world import IMAGE_KINDS, KINDS, Sample, sample

# Seeds of the prompts shown and measured; training never sees the "test" split they are from.
FIRST_SEED = 10_000


@dataclass
class Comparison:
    """One request's answers: the first round's in full, every round's decode times.

    ``timings`` holds per round ``(plain, msd)``, each a pair of decode tokens and seconds.
    """

    sample: Sample
    plain: Answer
    msd: Answer
    timings: list[tuple[tuple[int, float], tuple[int, float]]] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        """Whether both engines gave the same token ids."""
        return self.plain.token_ids == self.msd.token_ids


def held_out_samples(count: int, seed: int = FIRST_SEED) -> list[Sample]:
    """``count`` samples of the test split, the kinds in turn."""
    return [
        sample(KINDS[index % len(KINDS)], seed + index // len(KINDS), "test")
        for index in range(count)
    ]


def compare(
    pair: DemoPaths,
    samples: Sequence[Sample],
    *,
    dtype: str,
    num_speculative_tokens: int = 5,
    max_tokens: int = 192,
    rounds: int = 1,
    on_start: Callable[[], None] = lambda: None,
    on_answer: Callable[[Comparison], None] = lambda comparison: None,
    **engine_options: Any,
) -> list[Comparison]:
    """Answer every sample with both engines, one request at a time, in ``rounds`` rounds.

    Which engine goes first alternates from request to request and from round to round, so a machine
    that slows down or speeds up in between favours neither. ``on_start`` is called when both
    engines are up and warm, ``on_answer`` after each comparison, in every round.
    """
    plain = Engine(pair.target, dtype=dtype, **engine_options)
    msd = Engine(
        pair.target,
        draft=pair.draft,
        num_speculative_tokens=num_speculative_tokens,
        dtype=dtype,
        **engine_options,
    )
    for engine in (plain, msd):  # the first request pays for lazy set-up
        engine.answer(sample("vqa", FIRST_SEED - 1, "test"), 16)
    on_start()
    comparisons: list[Comparison] = []
    for round_index in range(rounds):
        for index, one in enumerate(samples):
            engines = [plain, msd] if (round_index + index) % 2 == 0 else [msd, plain]
            answers = {id(engine): engine.answer(one, max_tokens) for engine in engines}
            without, with_msd = answers[id(plain)], answers[id(msd)]
            if round_index == 0:
                comparisons.append(Comparison(one, without, with_msd))
            comparisons[index].timings.append(
                (
                    (without.decode_tokens, without.decode_seconds),
                    (with_msd.decode_tokens, with_msd.decode_seconds),
                )
            )
            on_answer(comparisons[index])
    return comparisons


def by_kind(comparisons: Iterable[Any]) -> dict[str, list[Any]]:
    """What has a ``sample``, by its kind, in the order of `KINDS`."""
    comparisons = list(comparisons)
    groups: dict[str, list[Any]] = {}
    for kind in KINDS:
        if group := [c for c in comparisons if c.sample.kind == kind]:
            groups[kind] = group
    return groups


def acceptance(answers: Iterable[Answer]) -> dict[str, Any]:
    """Acceptance over all verifications: ``acceptance_length`` is tokens per verification.

    The target's own token (the bonus) counts, so 1 means that no draft was ever accepted.
    """
    answers = list(answers)
    drafts = sum(a.num_drafts for a in answers)
    drafted = sum(a.num_draft_tokens for a in answers)
    accepted = sum(a.num_accepted_tokens for a in answers)
    positions = max((len(a.accepted_per_position) for a in answers), default=0)
    per_position = [0] * positions
    for a in answers:
        for index, count in enumerate(a.accepted_per_position):
            per_position[index] += count
    return {
        "verifications": drafts,
        "drafted": drafted,
        "accepted": accepted,
        "acceptance_length": 1 + accepted / drafts if drafts else None,
        "acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_rate_per_position": [n / drafts for n in per_position] if drafts else [],
    }


def speed(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Decode tokens per second of both engines at batch 1, and their ratio.

    ``speedup`` is the median of the rounds' ratios, so that other work on the machine during one of
    them does not decide it. ``median_step_seconds`` is the cost of one engine step, first round.
    """

    def rate(timings: Iterable[tuple[int, float]]) -> float | None:
        tokens, seconds = (sum(column) for column in zip(*timings, strict=True))
        return tokens / seconds if seconds else None

    rounds = []
    for index in range(len(comparisons[0].timings)):
        plain = rate(c.timings[index][0] for c in comparisons)
        msd = rate(c.timings[index][1] for c in comparisons)
        rounds.append(msd / plain if plain and msd else None)
    plain = rate(t[0] for c in comparisons for t in c.timings)
    msd = rate(t[1] for c in comparisons for t in c.timings)
    prefill = [
        statistics.median(getattr(c, name).prefill_seconds for c in comparisons)
        for name in ("plain", "msd")
    ]
    ratios = [ratio for ratio in rounds if ratio is not None]
    return {
        "plain_tokens_per_second": plain,
        "msd_tokens_per_second": msd,
        "speedup": statistics.median(ratios) if ratios else None,
        "speedup_per_round": rounds,
        "median_step_seconds": {
            "plain": _median_step([c.plain for c in comparisons]),
            "msd": _median_step([c.msd for c in comparisons]),
        },
        "median_first_token_seconds": {"plain": prefill[0], "msd": prefill[1]},
    }


def _median_step(answers: Iterable[Answer]) -> float | None:
    steps = [
        later[1] - earlier[1]
        for answer in answers
        for earlier, later in zip(answer.steps, answer.steps[1:], strict=False)
    ]
    return statistics.median(steps) if steps else None


def figures(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """All figures of one pair, over everything, over image requests, and by kind."""
    groups = by_kind(comparisons)
    images = [c for kind in IMAGE_KINDS for c in groups.get(kind, [])]
    return {
        "requests": len(comparisons),
        "identical": sum(c.identical for c in comparisons),
        "tokens": sum(len(c.msd.token_ids) for c in comparisons),
        "all": acceptance(c.msd for c in comparisons),
        "multimodal": acceptance(c.msd for c in images),
        "by_kind": {kind: acceptance(c.msd for c in group) for kind, group in groups.items()},
        "speed": speed(comparisons),
        "speed_by_kind": {kind: speed(group) for kind, group in groups.items()},
    }
