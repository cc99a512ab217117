"""What the real target learns from: the drawn world, `easy-vqa` (MIT), and talks of its own.

`easy-vqa` is a published set of questions about 5,000 pictures of one thing each, with its own
split into training and test pictures.
"""

import json
import random
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_msd.demo.paths import cache_dir
from vllm_msd.demo.real.packages import fetch
from vllm_msd.demo.real.target import SYSTEM

from ..slots import FIGURES, PAINTS
from ..walks import WALK, walk
from ..world import packed
from ..world.base import IMAGE_SIZE, Sample, Turn, choice_key, seeded, to_sample

PACKAGE = "easy-vqa==1.0"
EASY, TALK = "easy-vqa", "talk"
# What each of its questions can be answered by.
GROUPS = (("yes", "no"), FIGURES, PAINTS)
ANSWERS = tuple(answer for group in GROUPS for answer in group)
SPLITS = ("train", "test")
TURNS = 5
WRONG = "easy-vqa: got split {!r}, expected one of " + ", ".join(SPLITS)

# Shares in the two stages of the training.
VISION_MIX = {"vqa": 0.2, "textvqa": 0.45, "chart": 0.15, "reasoning": 0.12, EASY: 0.08}
MIX = {
    "vqa": 0.13,
    "textvqa": 0.17,
    "caption": 0.09,
    "chart": 0.13,
    "reasoning": 0.11,
    "conversation": 0.08,
    "text": 0.04,
    WALK: 0.06,
    EASY: 0.07,
    TALK: 0.12,
}


@lru_cache(maxsize=2)
def easy_questions(split: str) -> dict[int, list[tuple[str, str]]]:
    """Question and answer by the number of the picture.

    Raises:
        StorageError: the package cannot be fetched.
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(WRONG.format(split))
    found: dict[int, list[tuple[str, str]]] = defaultdict(list)
    rows = json.loads((_folder() / split / "questions.json").read_text("utf-8"))
    for question, answer, picture in rows:
        found[picture].append((question, answer))
    return dict(found)


def easy_sample(picture: int, turns: list[tuple[str, str]], split: str) -> Sample:
    """Questions about a picture, as a conversation."""
    path = _folder() / split / "images" / f"{picture}.png"
    with Image.open(path) as found:
        image = found.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    # Any of its questions may say what is in the picture.
    said = {answer for _, answer in easy_questions(split)[picture]}
    labels = {
        slot: words.index(word)
        for slot, words in (("figure", FIGURES), ("paint", PAINTS))
        for word in said.intersection(words)
    }
    group = {answer: group for group in GROUPS for answer in group}
    asked = [Turn(q, a.capitalize() + ".", choice_key(a, group[a])) for q, a in turns]
    return to_sample(image, asked, EASY, labels)


def easy_packed(seed: int) -> Sample:
    """A training conversation about one of its pictures."""
    rng = seeded(EASY, seed)
    questions = easy_questions("train")
    picture = rng.choice(sorted(questions))
    turns = rng.sample(questions[picture], min(TURNS, len(questions[picture])))
    return easy_sample(picture, turns, "train")


def easy_test(per_answer: int) -> list[Sample]:
    """Single questions of its test split, so many for each of the answers."""
    by_answer: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for picture, turns in sorted(easy_questions("test").items()):
        for question, answer in turns:
            by_answer[answer].append((picture, question))
    rng = random.Random(0)
    chosen = [
        (picture, question, answer)
        for answer in ANSWERS
        for picture, question in rng.sample(by_answer[answer], per_answer)
    ]
    rng.shuffle(chosen)
    return [easy_sample(p, [(question, answer)], "test") for p, question, answer in chosen]


def _folder() -> Path:
    return fetch((PACKAGE,), cache_dir() / "real-pictures") / "easy_vqa" / "data"


class Contents:
    """Draws a training conversation of a kind, by a number.

    Args:
        talks: file of conversations that the language model has answered, for the kind ``talk``.
        turns: of a conversation about a picture of the drawn world.
    """

    def __init__(self, talks: Path | None = None, turns: int = TURNS) -> None:
        self.turns = turns
        self.talks = [] if talks is None else json.loads(talks.read_text("utf-8"))

    def __call__(self, kind: str, number: int) -> Sample:
        if kind == EASY:
            return easy_packed(number)
        if kind == WALK:
            return walk(number, "train")
        if kind == TALK:
            return self._talk(number)
        return packed(kind, number, self.turns)

    def _talk(self, number: int) -> Sample:
        said = [turn["value"] for turn in self.talks[number % len(self.talks)]["conversations"]]
        turns = [Turn(*pair, {}) for pair in zip(said[::2], said[1::2], strict=True)]
        return to_sample(None, turns, TALK)


def render_parts(messages: list[dict[str, Any]]) -> list[str]:
    """Pieces of a talk in the real target's chat template: a question, its answer, ..."""
    pieces = []
    lead = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    for message in messages:
        text = "".join(p["text"] for p in message["content"] if p["type"] == "text")
        if message["role"] == "user":
            images = "".join("<image>\n" for p in message["content"] if p["type"] == "image")
            pieces.append(
                f"{lead}<|im_start|>user\n{images}{text}<|im_end|>\n<|im_start|>assistant\n"
            )
            lead = "\n"
        else:
            pieces.append(f"{text}<|im_end|>")
    return pieces
