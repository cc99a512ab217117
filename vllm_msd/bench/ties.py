"""Answers that differ from those without speculation, and which of them are near ties.

Checking several tokens at once rounds differently from one at a time. Where the target's best
tokens are so close that rounding decides, any of them may come out. The rule: at the first token
that differs, the log-probabilities of both tokens, asked for again without speculation, lie no
further below the best one than `GAPS` of the dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_msd.bench.drive import Reply
from vllm_msd.errors import ConfigError
from vllm_msd.measure.engine import Engine

# Logits of 16 to 32 are 0.125 apart in bf16 and 0.016 in fp16; four such steps. In fp32 sums of
# another order differ by some 1e-5 of a logit.
GAPS = {"bfloat16": 0.5, "float16": 0.0625, "float32": 1e-3}
_ASKED = 5  # log-probabilities: three tokens and more can be as good as each other


@dataclass(frozen=True)
class Difference:
    """One answer that differs. position: of the first token that does; ``token`` is the arm's and
    ``plain`` that of no speculation, None for an answer that ended before. gap: how far the less
    likely of the two lies below the target's best log-probability there; None until it is examined,
    and where one of them is not among the best few."""

    batch: int
    arm: str
    turn: int
    request: int
    position: int
    token: int | None
    plain: int | None
    prefix: list[int]
    gap: float | None = None
    is_near_tie: bool = False


def differences(
    plain: Sequence[Reply], replies: Sequence[Reply], batch: int, arm: str, turn: int
) -> list[Difference]:
    """Those of one cell, against the answers of no speculation to the same requests."""
    found = []
    for request, (wanted, got) in enumerate(zip(plain, replies, strict=True)):
        a, b = wanted.token_ids, got.token_ids
        if a != b:
            both = min(len(a), len(b))
            position = next((i for i in range(both) if a[i] != b[i]), both)
            token, own = (ids[position] if position < len(ids) else None for ids in (b, a))
            prefix = a[:position]
            found.append(Difference(batch, arm, turn, request, position, token, own, prefix))
    return found


def examine(
    engine: Engine, prompts: Sequence[dict[str, Any]], found: Sequence[Difference], dtype: str
) -> list[Difference]:
    """The differences with their gaps, from an engine without speculation.

    Args:
        engine: idle.
        prompts: of the requests, by number.
        found: what differs.
        dtype: what the target is computed in, one of `GAPS`.

    Raises:
        ConfigError: another dtype.
    """
    from vllm import SamplingParams

    if dtype not in GAPS:
        raise ConfigError(f"--dtype: got {dtype}, expected one of {', '.join(GAPS)}.")
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=_ASKED)
    asked: dict[tuple[int, ...], int] = {}
    for one in found:
        key = (one.request, *one.prefix)
        if key not in asked:
            asked[key] = len(asked)
            prompt = prompts[one.request]
            ids = [*prompt["prompt_token_ids"], *one.prefix]
            engine.llm.add_request(f"tie-{asked[key]}", {**prompt, "prompt_token_ids": ids}, params)
    best: dict[str, dict[int, float]] = {}
    while engine.llm.has_unfinished_requests():
        for output in engine.step()[0]:
            found_there = output.outputs[0].logprobs[0].items()
            best[output.request_id] = {token: value.logprob for token, value in found_there}
    return [_judged(one, best[f"tie-{asked[(one.request, *one.prefix)]}"], dtype) for one in found]


def _judged(one: Difference, best: dict[int, float], dtype: str) -> Difference:
    if one.token not in best or one.plain not in best:  # None of an answer that ended is in none
        return one
    gap = max(best.values()) - min(best[one.token], best[one.plain])
    return replace(one, gap=gap, is_near_tie=gap <= GAPS[dtype])
