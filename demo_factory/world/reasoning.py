"""Counting and comparing in a scene, with a written explanation before the result."""

import random

from .base import NUMBER_WORDS, Turn, capital, choice_key, join_words, spin
from .scene import COLOURS, SHAPES, SIZES, Scene, Thing, listing

COUNTS = NUMBER_WORDS[:7]


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _group(rng: random.Random, scene: Scene) -> tuple[str, list[Thing]]:
    """A plural phrase and the things it fits; mostly one that fits something."""
    kind = rng.choice(("shape", "colour", "size"))
    values = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}[kind]
    if rng.random() < 0.85:
        values = tuple(getattr(thing, kind) for thing in scene.things)
    value = rng.choice(values)
    phrase = _plural(value) if kind == "shape" else f"{value} objects"
    return phrase, [t for t in scene.things if getattr(t, kind) == value]


def _count(number: int) -> str:
    return NUMBER_WORDS[number]


def ask_count(rng: random.Random, scene: Scene) -> Turn:
    """How many circles are there?"""
    phrase, group = _group(rng, scene)
    question = spin(
        rng,
        "[How many {g} are there?|Count the {g} and explain.|How many {g} can you see? Explain."
        "|What is the number of {g}?]",
        g=phrase,
    )
    if group:
        body = spin(
            rng,
            "[Let me look for {g}.|I go through the picture to find {g}.|I look at each object.] "
            "[I find {l}.|I can see {l}.|There is {l}.]",
            g=phrase,
            l=listing(rng, group),
        )
    else:
        body = spin(
            rng,
            "[Let me look for {g}.|I go through the picture to find {g}.|I look at each object.] "
            "[The picture shows {l}.|I can see {l}.] [None of them fits.|Nothing here fits.]",
            g=phrase,
            l=listing(rng, list(scene.things), places=False),
        )
    end = spin(
        rng,
        "[So the answer is {n}.|That makes {n}.|In total the count is {n}.|The number is {n}.]",
        n=_count(len(group)),
    )
    return Turn(question, f"{body} {end}", choice_key(_count(len(group)), COUNTS, "last"))


def ask_total(rng: random.Random, scene: Scene) -> Turn:
    """How many objects are there?"""
    number = len(scene.things)
    question = spin(
        rng,
        "[How many objects are in the picture?|Count all the objects.|How many shapes are there in"
        " all? Explain.]",
    )
    rows = []
    for row, name in enumerate(("top", "middle", "bottom")):
        count = sum(t.row == row for t in scene.things)
        rows.append(f"{_count(count)} in the {name} row")
    answer = spin(
        rng,
        "[I count row by row.|Let me go row by row.|Row by row:] [There are {r}.|I see {r}.] "
        "[So the answer is {n}.|Together that makes {n}.|Adding them gives {n}.]",
        r=join_words(rows),
        n=_count(number),
    )
    return Turn(question, answer, choice_key(_count(number), COUNTS, "last"))


def ask_compare(rng: random.Random, scene: Scene) -> Turn:
    """Are there more circles or more stars?"""
    kind = rng.choice(("shape", "colour"))
    present = sorted({getattr(t, kind) for t in scene.things})
    every = list(SHAPES if kind == "shape" else COLOURS)
    first = rng.choice(present)
    rest = [v for v in (present if rng.random() < 0.8 else every) if v != first]
    second = rng.choice(rest or [v for v in every if v != first])
    if rng.random() < 0.5:
        first, second = second, first
    a, b = (sum(getattr(t, kind) == v for t in scene.things) for v in (first, second))

    def named(value: str) -> str:
        return _plural(value) if kind == "shape" else f"{value} objects"

    question = spin(
        rng,
        "[Are there more {a} or more {b}?|Which are more numerous, the {a} or the {b}?"
        "|Compare the number of {a} with the number of {b}.]",
        a=named(first),
        b=named(second),
    )
    body = spin(
        rng,
        "[I count both.|Let me count.|First I count each kind.] [The number of {a} is {x}, and the "
        "number of {b} is {y}.|I find {x} for the {a} and {y} for the {b}."
        "|For the {a} I get {x}, for the {b} {y}.]",
        a=named(first),
        b=named(second),
        x=_count(a),
        y=_count(b),
    )
    if a == b:
        end = spin(rng, "[So the numbers are equal.|So it is equal.|The two counts are equal.]")
        value = "equal"
    else:
        value = named(first if a > b else second)
        end = spin(
            rng, "[So there are more {v}.|So the answer is: more {v}.|There are more {v}.]", v=value
        )
        value = f"more {value}"
    options = (f"more {named(first)}", f"more {named(second)}", "equal")
    return Turn(question, f"{body} {end}", choice_key(value, options, "last"))


def reasoning_turn(rng: random.Random, scene: Scene) -> Turn:
    """A counting or comparing question."""
    ask = rng.choices((ask_count, ask_compare, ask_total), (3, 2, 1))[0]
    turn = ask(rng, scene)
    return Turn(turn.question, capital(turn.answer), turn.key)
