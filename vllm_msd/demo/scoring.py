"""How answers to the held-out samples are judged."""

import re
from typing import Any

from vllm_msd.demo.samples import HeldOutSample


def _mentions(text: str, options: list[str]) -> list[str]:
    """The options named in `text`, in order of appearance; longer options win over shorter."""
    ordered = sorted(options, key=len, reverse=True)
    pattern = r"(?<![A-Za-z0-9])(" + "|".join(re.escape(o) for o in ordered) + r")(?![A-Za-z0-9])"
    lowered = {option.lower(): option for option in options}
    return [lowered[m.lower()] for m in re.findall(pattern, text, flags=re.IGNORECASE)]


def score_key(key: dict[str, Any], answer: str) -> float:
    """Score of an answer between 0 and 1.

    `choice`: the first (or last) option that the answer names is the right one.
    `sequence`: the options that the answer names, in order and without repeats, are the values.
    `members`: the first sentence names the wanted number of options.
    `phrases`: F1 between the expected phrases and the phrases of that form in the answer.
    """
    if key["type"] == "choice":
        named = _mentions(answer, key["options"])
        if not named:
            return 0.0
        return float(named[0 if key["which"] == "first" else -1] == key["value"])
    if key["type"] == "sequence":
        named = list(dict.fromkeys(_mentions(answer, key["options"])))
        return float(named == list(key["values"]))
    if key["type"] == "members":
        named = set(_mentions(answer.split(".")[0], key["options"]))
        return float(len(named) == key["count"])
    if key["type"] == "phrases":
        found = set(re.findall(key["pattern"], answer, flags=re.IGNORECASE))
        wanted = set(key["values"])
        hits = len(found & wanted)
        return 2 * hits / (len(found) + len(wanted)) if hits else 0.0
    raise ValueError(
        f"got answer key type {key['type']!r}, expected choice, sequence, members or phrases"
    )


def score(sample: HeldOutSample, answer: str) -> float:
    """Score of `answer` to the last question: 1 right, 0 wrong, between for captions."""
    return score_key(sample.answer_key, answer)
