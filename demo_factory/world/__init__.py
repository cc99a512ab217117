"""A small procedural world: images with questions and answers, and text-only instructions.

`sample(kind, seed, split)` is one request; `packed(kind, seed)` is a training conversation with
several questions about one image. Both depend on their arguments alone, and a content (scene,
signs, chart, task) belongs to exactly one split by its hash.
"""

import random
from collections.abc import Callable
from typing import Any

from .base import SPLITS, Sample, Turn, draw_content, to_sample
from .caption import caption_turn
from .charts import chart_labels, chart_turn, draw_chart, make_chart
from .reasoning import reasoning_turn
from .scene import draw_scene, make_scene, scene_labels
from .signs import draw_street, make_street, street_labels, textvqa_turn
from .text import make_task, text_turn
from .vqa import follow_up, vqa_turn

IMAGE_KINDS = ("vqa", "textvqa", "caption", "chart", "reasoning", "conversation")
KINDS = [*IMAGE_KINDS, "text"]

__all__ = ["IMAGE_KINDS", "KINDS", "SPLITS", "Sample", "packed", "sample"]

Asker = Callable[[random.Random, Any], Turn]


def _reasoning_scene(rng: random.Random) -> Any:
    return make_scene(rng, 3, 6)


# Kind -> (content, drawing, slot labels, question).
_WORLDS: dict[str, tuple[Callable, Callable, Callable, Asker]] = {
    "vqa": (make_scene, draw_scene, scene_labels, vqa_turn),
    "textvqa": (make_street, draw_street, street_labels, textvqa_turn),
    "caption": (make_scene, draw_scene, scene_labels, caption_turn),
    "chart": (make_chart, draw_chart, chart_labels, chart_turn),
    "reasoning": (_reasoning_scene, draw_scene, scene_labels, reasoning_turn),
}


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"got kind {kind!r}, expected one of {', '.join(KINDS)}")


def _distinct(rng: random.Random, ask: Asker, content: Any, count: int) -> list[Turn]:
    """Up to `count` turns with different questions."""
    turns: dict[str, Turn] = {}
    for _ in range(4 * count):
        turn = ask(rng, content)
        turns.setdefault(turn.question, turn)
        if len(turns) == count:
            break
    return list(turns.values())


def _mixed_scene_turn(rng: random.Random, scene: Any) -> Turn:
    return (vqa_turn if rng.random() < 0.6 else reasoning_turn)(rng, scene)


def _conversation(rng: random.Random, kind: str, content: Any, count: int) -> list[Turn]:
    ask = _mixed_scene_turn if kind in ("vqa", "reasoning", "caption") else _WORLDS[kind][3]
    first, *rest = _distinct(rng, ask, content, count)
    return [first] + [follow_up(rng, content, turn) for turn in rest]


def sample(kind: str, seed: int, split: str = "test") -> Sample:
    """One request of `kind`.

    Raises:
        ValueError: unknown kind or split.
    """
    _check(kind)
    if kind == "text":
        task, rng = draw_content(make_task, split, kind, seed)
        turns = [text_turn(rng, task)]
        return to_sample(None, turns, kind)
    world = kind
    if kind == "conversation":
        world = ("vqa", "textvqa", "chart", "reasoning")[seed % 4]
    make, draw, labels, ask = _WORLDS[world]
    content, rng = draw_content(make, split, kind, seed)
    if kind == "conversation":
        turns = _conversation(rng, world, content, rng.randint(2, 4))
    else:
        turns = [ask(rng, content)]
    return to_sample(draw(content), turns, kind, labels(content))


def packed(kind: str, seed: int, turns: int = 5) -> Sample:
    """A training conversation of up to `turns` questions about one image (or text tasks).

    The caller cuts it to its token budget by dropping turns from the end.
    """
    _check(kind)
    if kind == "text":
        talks = []
        for index in range(turns):
            task, rng = draw_content(make_task, "train", "packed", kind, seed, index)
            talks.append(text_turn(rng, task))
        return to_sample(None, talks, kind)
    world = kind
    if kind == "conversation":
        world = ("vqa", "textvqa", "chart", "reasoning")[seed % 4]
    make, draw, labels, ask = _WORLDS[world]
    content, rng = draw_content(make, "train", "packed", kind, seed)
    if kind == "conversation":
        talks = _conversation(rng, world, content, turns)
    elif kind == "caption":
        talks = [caption_turn(rng, content), *_distinct(rng, vqa_turn, content, turns - 2)]
    else:
        talks = _distinct(rng, ask, content, turns)
    return to_sample(draw(content), talks, kind, labels(content))
