"""Answers that walk through a picture and read it on the way: the kind ``walk``.

One of the world's questions with the longest lists: a caption of five or six objects, a chart of
five values read from left to right, three signs read from top to bottom. The demo's target knows
all of them. What it says next is on the picture, a few words ahead of what its hidden state holds:
a draft that looks at the picture can go on where one without must guess.

`reading` measures that the target does look at each place on the way.

It is a kind of its own, not one of the world's `KINDS`: the demo's samples take those in turn.
"""

import random
import re
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .world.base import Sample, Turn, capital, draw_content, seeded, to_sample
from .world.caption import caption_turn
from .world.charts import VALUES, Chart, ask_all, chart_labels, draw_chart, make_chart
from .world.scene import COLOURS, Scene, draw_scene, make_scene, scene_labels
from .world.signs import PLATES, Street, draw_street, make_street, street_labels
from .world.signs import ask_all as ask_signs

WALK = "walk"


def _scene(rng: random.Random) -> Scene:
    return make_scene(rng, 5, 6)


def _chart(rng: random.Random) -> Chart:
    while len((chart := make_chart(rng)).values) < 5:
        pass
    return chart


def _street(rng: random.Random) -> Street:
    while len((street := make_street(rng)).signs) < 3:
        pass
    return street


# Content, drawing, slot labels, question.
_WALKS: tuple[tuple[Callable, Callable, Callable, Callable[[random.Random, Any], Turn]], ...] = (
    (_scene, draw_scene, scene_labels, caption_turn),
    (_chart, draw_chart, chart_labels, ask_all),
    (_street, draw_street, street_labels, ask_signs),
)


# What is read at each place: slots (see `slots`) and words; 0 is an empty slot.
_READ: tuple[tuple[list[str], tuple[str, ...]], ...] = (
    ([f"cell{cell}.colour" for cell in range(9)], tuple(COLOURS)),
    ([f"value{i}" for i in range(5)], VALUES),
    ([f"row{row}.plate" for row in range(3)], tuple(PLATES)),
)
NAMES = ("scenes", "charts", "signs")


def walk(seed: int, split: str = "test") -> Sample:
    """One request; scenes, charts and streets in turn of the seeds."""
    make, draw, labels, ask = _WALKS[seed % len(_WALKS)]
    content, rng = draw_content(make, split, WALK, seed)
    turn = ask(rng, content)
    turn = Turn(turn.question, capital(turn.answer), turn.key)
    return to_sample(draw(content), [turn], WALK, labels(content))


def walks(count: int, seed: int, split: str = "train") -> list[Sample]:
    """So many requests, drawn by one seed."""
    rng = seeded(WALK, seed, split)
    return [walk(3 * rng.getrandbits(40) + i % 3, split) for i in range(count)]


def reading(target_path: Path, count: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """How much of its walks the target reads off the picture.

    It answers held-out walks with their pictures, and with another one's of the same sort.

    Returns:
        By sort of walk, ``own`` and ``other``: the share of answers whose first, second, ... colour
        or value is the one in the question's own picture.
    """
    from vllm_msd.training.targets import Target

    from .replies import greedy_replies, reply_text

    target = Target.load(target_path, "float32")
    found: dict[str, dict[str, list[float]]] = {name: {} for name in NAMES}
    for picture in ("own", "other"):
        samples = walks(count, seed, "test")
        if picture == "other":
            images = [one.images for one in samples]
            for i, one in enumerate(samples):
                one.images = images[(i + len(NAMES)) % count]
        replies = greedy_replies(target, samples)
        texts = [reply_text(target, reply) for reply in replies]
        for sort, name in enumerate(NAMES):
            mine = slice(sort, None, len(NAMES))
            pairs = zip(samples[mine], texts[mine], strict=True)
            places = zip_longest(*[walk_hits(sort, one, text) for one, text in pairs])
            shares = [[hit for hit in place if hit is not None] for place in places]
            found[name][picture] = [round(sum(hit) / len(hit), 3) for hit in shares]
    return found


def walk_hits(sort: int, asked: Sample, said: str) -> list[bool]:
    """Whether the words said are those in the picture, place by place, for a sort of `NAMES`."""
    slots, words = _READ[sort]
    wanted = [words[asked.labels[slot] - 1] for slot in slots if asked.labels[slot]]
    got = re.findall(rf"\b(?:{'|'.join(words)})\b", said)
    return [i < len(got) and got[i] == word for i, word in enumerate(wanted)]
