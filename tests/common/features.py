"""Many features of a request side by side in one batch: what each gives with and without MSD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LOGPROB_TOLERANCE = 1e-4
PATTERN = "(I see|There is) (a|one) (small |large )?(red|blue) (circle|star)( and a [a-z]+)?"


def feature_params(max_tokens: int, words: Sequence[str]) -> dict[str, Any]:
    """Sampling parameters by name; all of them have one right answer.

    Args:
        max_tokens: of each.
        words: two words that occur in ordinary answers, to stop at or to forbid (vLLM forbids a
            word only as it is written at the start of a text, so the full stop is what tells).
    """
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams as Structured

    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "logprobs": {"logprobs": 5},
        "bad words": {"bad_words": [".", *words]},
        "repetition penalty": {"repetition_penalty": 1.4},
        "presence and frequency penalty": {"presence_penalty": 1.2, "frequency_penalty": 0.7},
        "choice": {"structured_outputs": Structured(choice=["a red circle", "a blue square"])},
        "regular expression": {"structured_outputs": Structured(regex=PATTERN)},
        "stop string": {"stop": [words[0]]},
        "min tokens": {"stop": [words[0]], "min_tokens": max_tokens - 2},
        "top-1 sampling, n = 3": {"temperature": 1.0, "top_k": 1, "n": 3},
        "logprobs under a penalty": {"logprobs": 3, "repetition_penalty": 1.2},
    }
    common = {"temperature": 0.0, "max_tokens": max_tokens}
    return {name: SamplingParams(**{**common, **own}) for name, own in settings.items()}


def ask(engine: Any, prompts: Sequence[dict[str, Any]], params: dict[str, Any]) -> dict[str, Any]:
    """One batch: every feature with a prompt of its own (``prompts`` repeat as needed)."""
    chosen = [prompts[i % len(prompts)] for i in range(len(params))]
    outputs = engine.generate(chosen, list(params.values()), use_tqdm=False)
    answers = {}
    for name, output in zip(params, outputs, strict=True):
        samples = [[list(o.token_ids), o.text, o.finish_reason] for o in output.outputs]
        table = [
            {str(token): entry.logprob for token, entry in sorted(step.items())}
            for step in output.outputs[0].logprobs or []
        ]
        answers[name] = {"samples": samples, "logprobs": table}
    return answers


def differences(expected: dict[str, Any], got: dict[str, Any]) -> list[dict[str, Any]]:
    """Features whose tokens differ, or whose logprobs do by more than the tolerance."""
    found = []
    for name, want in expected.items():
        have = got[name]
        if want["samples"] != have["samples"]:
            found.append({"feature": name, "expected": want["samples"], "got": have["samples"]})
        elif (error := logprob_error(want["logprobs"], have["logprobs"])) > LOGPROB_TOLERANCE:
            found.append({"feature": name, "logprob_error": error})
    return found


def logprob_error(expected: Sequence[dict[str, float]], got: Sequence[dict[str, float]]) -> float:
    """The largest difference of two logprob tables; infinite when they list other tokens."""
    if [set(step) for step in expected] != [set(step) for step in got]:
        return float("inf")
    return max(
        (abs(a[token] - b[token]) for a, b in zip(expected, got, strict=True) for token in a),
        default=0.0,
    )
