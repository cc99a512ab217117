"""Shared pieces of the procedural world: samples, seeded randomness and the wording grammar."""

import hashlib
import random
import re
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vllm_msd.demo.samples import HeldOutSample

IMAGE_SIZE = 112
SPLITS = ("train", "test")
# One content in eight belongs to the test split; the rest is for training.
TEST_SHARE = 8

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass
class Turn:
    """One question with its answer; `key` says how to score one (see `vllm_msd.demo.scoring`)."""

    question: str
    answer: str
    key: dict[str, Any]


@dataclass
class Sample(HeldOutSample):
    """One request of the world, or a training conversation.

    The first user message of the prompt holds the `{"type": "image"}` part when there is an image.

    labels: facts about the image by slot name, used only to warm up the vision tower.
    """

    labels: dict[str, int] = field(default_factory=dict)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt and the right answer."""
        return [*self.prompt, _message("assistant", self.answer)]


def seeded(*parts: Any) -> random.Random:
    """A generator that depends on nothing but `parts` (stable across processes and versions)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def split_of(content: Any) -> str:
    """The split that owns a content (anything with a stable `repr`)."""
    digest = hashlib.blake2b(repr(content).encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_SHARE == 0 else "train"


def draw_content(make: Any, split: str, *seed: Any) -> tuple[Any, random.Random]:
    """Draw contents with `make(rng)` until one belongs to `split`.

    The split is a function of the content itself, so no content is in both. Returns the content
    and the generator, to be used for wording.
    """
    if split not in SPLITS:
        raise ValueError(f"got split {split!r}, expected one of {', '.join(SPLITS)}")
    rng = seeded(split, *seed)
    while True:
        content = make(rng)
        if split_of(content) == split:
            return content, rng


def pick(rng: random.Random, options: Any) -> Any:
    """Choose with Zipf-like weights: earlier options are likelier, all are possible.

    Natural wording is uneven; even weights would make every greedy choice a near tie.
    """
    options = list(options)
    return rng.choices(options, [1 / (i + 1) for i in range(len(options))])[0]


_GROUP = re.compile(r"\[([^\[\]]*)\]")


def spin(rng: random.Random, template: str, **values: Any) -> str:
    """Expand `[a|b|c]` choices (nesting allowed, innermost first), then `{name}` fields."""
    while match := _GROUP.search(template):
        choice = pick(rng, match.group(1).split("|"))
        template = template[: match.start()] + choice + template[match.end() :]
    text = template.format(**values)
    text = re.sub(r"\b([Aa]) (?=[aeiou]\w)", r"\1n ", text)
    return re.sub(r" +", " ", text).strip()


def join_words(parts: list[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + f" {last} {parts[-1]}"


def article(noun: str) -> str:
    """The noun phrase with `a` or `an`."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def choice_key(value: str, options: Any, which: str = "first") -> dict[str, Any]:
    """A key met when the first (or last) of `options` named in an answer is `value`."""
    return {"type": "choice", "value": value, "options": list(options), "which": which}


def to_sample(
    image: Image.Image | None, turns: list[Turn], kind: str, labels: dict[str, int] | None = None
) -> Sample:
    """A sample that asks the last turn's question; the image part comes first of all."""
    *earlier, last = turns
    prompt = []
    for turn in earlier:
        prompt += [_message("user", turn.question), _message("assistant", turn.answer)]
    prompt.append(_message("user", last.question))
    if image is not None:
        prompt[0]["content"].insert(0, {"type": "image"})
    images = [] if image is None else [image]
    return Sample(images, prompt, kind, last.answer, last.key, labels or {})


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
