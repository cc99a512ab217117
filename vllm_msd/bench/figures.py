"""The figures of a run, from what was measured; nothing here knows vLLM or reads a clock."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_msd.bench.arms import NONE, Arm
from vllm_msd.bench.drive import Cell, Reply
from vllm_msd.bench.ideal import Bounds, shares
from vllm_msd.bench.ties import Difference
from vllm_msd.measure.compare import acceptance_figures

NOT_SLOWER = 0.97  # of no speculation: below it an arm counts as slower


@dataclass(frozen=True)
class Results:
    """What was measured.

    cells: by temperature, batch size and arm, one of each pass. kinds: of work, by request; where
    a cell has more requests, they come again. ideal: of `vllm_msd.bench.ideal.measure_ideal`.
    compared: whether answers say anything; those of random weights do not.
    """

    arms: Sequence[Arm]
    cells: Mapping[tuple[float, int, str], Sequence[Cell]]
    kinds: Sequence[str]
    differences: Sequence[Difference]
    ideal: Mapping[str, Any]
    compared: bool = True


def summary(results: Results) -> dict[str, Any]:
    """All figures, in JSON's types.

    ``cells`` holds, for each temperature and batch size, the figures of each arm, and ``auto``,
    those of the arm `auto` beside the best that is fixed. ``support`` says for each arm and batch
    size whether its greedy answers are those of no speculation, near ties aside, and whether it is
    at least `NOT_SLOWER` times as fast.
    """
    bounds = None if "missing" in results.ideal else Bounds(results.ideal)
    groups = list(dict.fromkeys((t, batch) for t, batch, _ in results.cells))
    cells = [
        {
            "temperature": temperature,
            "batch": batch,
            "arms": {
                arm.name: _arm(results, bounds, temperature, batch, arm) for arm in results.arms
            },
        }
        for temperature, batch in groups
    ]
    for cell in cells:
        if found := _auto(results.arms, cell["arms"]):
            cell["auto"] = found
    ideal = {k: results.ideal[k] for k in ("missing", "products", "profile") if k in results.ideal}
    return {
        "arms": {arm.name: str(arm) for arm in results.arms},
        "cells": cells,
        "differences": [_difference(one) for one in results.differences],
        "support": _support(cells) if results.compared else {},
        **ideal,
    }


def _arm(
    results: Results, bounds: Bounds | None, temperature: float, batch: int, arm: Arm
) -> dict[str, Any]:
    measured = results.cells[temperature, batch, arm.name]
    plain = results.cells[temperature, batch, NONE]
    rates = [cell.tokens / cell.seconds for cell in measured]
    ratios = [
        rate / (other.tokens / other.seconds) for rate, other in zip(rates, plain, strict=True)
    ]
    steps = [step for cell in measured for step in cell.full_steps]
    plain_steps = [step for cell in plain for step in cell.full_steps]
    plain_seconds = sum(step[3] for step in plain_steps)
    plain_rate = sum(step[4] for step in plain_steps) / plain_seconds if plain_seconds else 0.0
    replies = [reply for cell in measured for reply in cell.replies]
    is_compared = results.compared and temperature == 0
    return {
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_per_pass": rates,
        "speedup": statistics.median(ratios),
        "speedup_per_pass": ratios,
        "speedup_per_sample": _per_sample(measured, plain),
        **shares(bounds, arm, batch, steps, plain_rate),
        **_acceptance(measured),
        **_latency(replies),
        "requests": len(replies),
        "distinct_requests": min(len(results.kinds), len(measured[0].replies)),
        "tokens": sum(len(reply.token_ids) for reply in replies),
        "natural_ends": sum(reply.finish == "stop" for reply in replies),
        **(_identity(results, batch, arm, len(replies)) if is_compared else {}),
        "by_kind": _by_kind(measured, plain, results.kinds),
    }


def _auto(arms: Sequence[Arm], figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arm `auto` against no speculation and the best size of MSD's that is fixed, none among
    them; None where one of them did not run."""
    auto = next((arm.name for arm in arms if arm.method == "auto"), None)
    fixed = [arm.name for arm in arms if arm.method in ("chain", "tree")]
    if auto is None or not fixed:
        return None
    best = max((NONE, *fixed), key=lambda name: figures[name]["tokens_per_second"])
    one, rates = figures[auto], figures[best]["tokens_per_second_per_pass"]
    ratios = [a / b for a, b in zip(one["tokens_per_second_per_pass"], rates, strict=True)]
    return {
        "best_fixed": best,
        "of_best_fixed": statistics.median(ratios),
        "of_best_fixed_per_pass": ratios,
        "of_none": one["speedup"],
        "share_of_ideal_speedup": one["share_of_ideal_speedup"],
        "share_of_ideal_tokens_per_second": one["share_of_ideal_tokens_per_second"],
    }


def _acceptance(cells: Sequence[Cell]) -> dict[str, Any]:
    return acceptance_figures(
        sum(cell.verifications for cell in cells),
        sum(cell.drafted for cell in cells),
        sum(cell.accepted for cell in cells),
        [cell.accepted_by_depth for cell in cells],
    )


def _latency(replies: Sequence[Reply]) -> dict[str, float | None]:
    """Milliseconds to the first token, and for each further one."""
    first = [1000 * reply.first for reply in replies]
    each = [
        1000 * (reply.last - reply.first) / (len(reply.token_ids) - 1)
        for reply in replies
        if len(reply.token_ids) > 1
    ]
    return {
        "ttft_median_ms": percentile(first, 50),
        "ttft_p90_ms": percentile(first, 90),
        "tpot_median_ms": percentile(each, 50),
        "tpot_p90_ms": percentile(each, 90),
    }


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear between the values; None of none."""
    return float(np.percentile(values, percent)) if values else None


def _identity(results: Results, batch: int, arm: Arm, compared: int) -> dict[str, int]:
    """Answers of all passes against those of no speculation's first pass."""
    found = [d for d in results.differences if (d.batch, d.arm) == (batch, arm.name)]
    return {
        "identical": compared - len(found),
        "near_ties": sum(d.is_near_tie for d in found),
        "differing": sum(not d.is_near_tie for d in found),
    }


def _per_sample(measured: Sequence[Cell], plain: Sequence[Cell]) -> float | None:
    """The mean over requests of each one's own speed-up, prompt included."""
    ratios = []
    for cell, other in zip(measured, plain, strict=True):
        for reply, before in zip(cell.replies, other.replies, strict=True):
            if reply.token_ids and before.token_ids:
                speed = len(reply.token_ids) / reply.last
                ratios.append(speed / (len(before.token_ids) / before.last))
    return statistics.fmean(ratios) if ratios else None


def _by_kind(
    measured: Sequence[Cell], plain: Sequence[Cell], kinds: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """What a request of each kind gets, while others run beside it."""
    found, before = _of_kinds(measured, kinds), _of_kinds(plain, kinds)
    result = {}
    for kind, replies in found.items():
        rate, other = _rate(replies), _rate(before[kind])
        further = sum(len(reply.token_ids) - 1 for reply in replies if reply.token_ids)
        steps = sum(reply.steps - 1 for reply in replies if reply.token_ids)
        result[kind] = {
            "requests": len(replies),
            "tokens_per_second_of_a_request": rate,
            "speedup": rate / other if rate and other else None,
            "tokens_per_step": further / steps if steps else None,
        }
    return result


def _of_kinds(cells: Sequence[Cell], kinds: Sequence[str]) -> dict[str, list[Reply]]:
    found: dict[str, list[Reply]] = {}
    for cell in cells:
        for number, reply in enumerate(cell.replies):
            found.setdefault(kinds[number % len(kinds)], []).append(reply)
    return found


def _rate(replies: Sequence[Reply]) -> float | None:
    seconds = sum(reply.last for reply in replies)
    return sum(len(reply.token_ids) for reply in replies) / seconds if seconds else None


def _support(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, bool]]]:
    found: dict[str, dict[str, dict[str, bool]]] = {}
    for cell in cells:
        if cell["temperature"] != 0:
            continue
        for name, one in cell["arms"].items():
            if name != NONE:
                found.setdefault(name, {})[str(cell["batch"])] = {
                    "identical": one["differing"] == 0,
                    "not_slower": one["speedup"] >= NOT_SLOWER,
                }
    return found


def verdict(one: Mapping[str, bool]) -> str:
    """An entry of ``support`` in words."""
    if not one["identical"]:
        return "other answers"
    return "works" if one["not_slower"] else "slower"


def _difference(one: Difference) -> dict[str, Any]:
    names = ("batch", "arm", "request", "position", "gap", "is_near_tie")
    return {"pass": one.turn, **{name: getattr(one, name) for name in names}}
