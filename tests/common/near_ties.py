"""What the benchmark asks about answers that differ, against log-probabilities of decoding."""

from __future__ import annotations

from typing import Any

from vllm_msd.bench.ties import Difference, examine
from vllm_msd.demo.paths import demo_pair
from vllm_msd.demo.samples import held_out_samples
from vllm_msd.measure.engine import Engine


def near_ties(runner: str, count: int = 4, max_tokens: int = 12) -> dict[str, Any]:
    """Made-up differences at every token of a few answers, and the gaps of the answers themselves.

    The other token is the second best at even places, the third at odd places.

    Returns:
        ``gaps`` of the best and the other token while decoding, ``asked`` (gap, near tie) of the
        differences in the same order, ``dtype`` of the engine.
    """
    from vllm import SamplingParams

    engine = Engine(demo_pair().target)
    prompts = [engine.prompt(sample) for sample in held_out_samples(count)]
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=5)
    for number, prompt in enumerate(prompts):
        engine.llm.add_request(str(number), prompt, params)
    answers: dict[int, Any] = {}
    while engine.llm.has_unfinished_requests():
        for output in engine.step()[0]:
            answers[int(output.request_id)] = output.outputs[0]
    found, gaps = [], []
    for number in range(count):
        ids = list(answers[number].token_ids)
        for position, table in enumerate(answers[number].logprobs):
            best = sorted(table.items(), key=lambda item: item[1].rank)
            other, value = best[1 if position % 2 == 0 else 2]
            gaps.append(best[0][1].logprob - value.logprob)
            found.append(
                Difference(1, "chain", 0, number, position, other, ids[position], ids[:position])
            )
    asked = [(one.gap, one.is_near_tie) for one in examine(engine, prompts, found, "bfloat16")]
    return {"gaps": gaps, "asked": asked, "dtype": engine.dtype}
