"""General questions about a scene: colours, shapes, places, relations, presence."""

import random

from .base import Turn, capital, choice_key, pick, spin
from .scene import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing, listing, place_phrase

RELATIONS = ("left", "right", "above", "below")


def _aside(rng: random.Random, scene: Scene, thing: Thing) -> str:
    """A closing remark that the question did not ask for."""
    others = [t for t in scene.things if t is not thing]
    if not others:
        return spin(rng, "[Nothing else is in the picture.|It is the only thing there.]")
    other = rng.choice(others)
    return spin(
        rng,
        "[There is also a {o} {p}.|Besides it, there is a {o} {p}."
        "|The picture also shows a {o} {p}.|It shares the picture with a {o} {p}.]",
        o=other.name,
        p=place_phrase(rng, other.cell),
    )


def _ask_about(
    rng: random.Random, scene: Scene, unique: str, question: str, answer: str
) -> tuple[Thing, str, str] | None:
    """A thing that is alone in its `unique` attribute, the question about it, and the answer.

    The texts may hold {s}hape, {c}olour, si{z}e, {n}ame; the answer {p}lace too. None if no thing
    is alone.
    """
    things = scene.unique(unique)
    if not things:
        return None
    t = rng.choice(things)
    words = {"s": t.shape, "c": t.colour, "z": t.size, "n": t.short}
    question = spin(rng, question, **words)
    return t, question, spin(rng, answer, p=place_phrase(rng, t.cell), **words)


def ask_colour(rng: random.Random, scene: Scene) -> Turn | None:
    """What colour is the circle?"""
    asked = _ask_about(
        rng,
        scene,
        "shape",
        "[What colour is the {s}?|Which colour does the {s} have?|Tell me the {s}'s colour.]",
        "[The {s} is {c}.|It is {c}.|The {s} you ask about is {c}.|Its colour is {c}.] "
        "[It is {z} and sits {p}.|You can find it {p}, and it is {z}."
        "|This {z} shape is {p}.|It is a {z} one {p}.]",
    )
    if asked is None:
        return None
    t, question, answer = asked
    return Turn(question, f"{answer} {_aside(rng, scene, t)}", choice_key(t.colour, COLOURS))


def ask_shape(rng: random.Random, scene: Scene) -> Turn | None:
    """What shape is the red thing?"""
    asked = _ask_about(
        rng,
        scene,
        "colour",
        "[What shape is the {c} object?|Which shape is {c}?|What is the {c} thing?"
        "|Name the shape of the {c} object.]",
        "[The {c} object is a {s}.|It is a {s}.|That is a {z} {s}.|The {c} one is a {z} {s}.] "
        "[It sits {p}.|You can see it {p}.|It is {p}.|Look {p} to find it.]",
    )
    if asked is None:
        return None
    t, question, answer = asked
    return Turn(question, f"{answer} {_aside(rng, scene, t)}", choice_key(t.shape, SHAPES))


def ask_at_place(rng: random.Random, scene: Scene) -> Turn:
    """What is in the middle?"""
    t = rng.choice(scene.things)
    question = spin(
        rng,
        "[What is {p}?|What can you see {p}?|Describe the object {p}.|Which object is {p}?]",
        p=place_phrase(rng, t.cell),
    )
    answer = spin(
        rng,
        "[There is a {n}.|I can see a {n} there.|That is a {n}.|It is a {n}.|You will find a {n}"
        " there.] [The {s} is {c}, and it is {z}.|Its colour is {c} and its size is {z}."
        "|This {s} is {z}, and its colour is {c}.]",
        n=t.name,
        s=t.shape,
        c=t.colour,
        z=t.size,
    )
    return Turn(question, f"{answer} {_aside(rng, scene, t)}", choice_key(t.shape, SHAPES))


def ask_size(rng: random.Random, scene: Scene) -> Turn:
    """Is the thing in the middle small or large?"""
    t = rng.choice(scene.things)
    p = place_phrase(rng, t.cell)
    question = spin(
        rng,
        "[How big is the {s} {p}?|Is the {s} {p} small or large?|What size is the {s} {p}?]",
        s=t.shape,
        p=p,
    )
    answer = spin(
        rng,
        "[The {s} is {z}.|It is {z}.|That {s} is {z}.|It is a {z} {s}.] "
        "[Its colour is {c}.|It is painted {c}.|It has the colour {c}.]",
        s=t.shape,
        z=t.size,
        c=t.colour,
    )
    return Turn(question, f"{answer} {_aside(rng, scene, t)}", choice_key(t.size, SIZES))


def ask_presence(rng: random.Random, scene: Scene) -> Turn:
    """Is there a red circle?"""
    present = rng.random() < 0.5
    shorts = {t.short: t for t in scene.things}
    if present:
        name = rng.choice(sorted(shorts))
    else:
        name = rng.choice([f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in shorts])
    question = spin(
        rng,
        "[Is there a {n} in the picture?|Can you see a {n}?|Does the picture show a {n}?]",
        n=name,
    )
    if present:
        t = shorts[name]
        answer = spin(
            rng,
            "Yes, [there is|I can see|the picture shows] a {n} {p}. [It is {z}.|The {s} is {z}.]",
            n=name,
            p=place_phrase(rng, t.cell),
            z=t.size,
            s=t.shape,
        )
        return Turn(question, f"{answer} {_aside(rng, scene, t)}", choice_key("yes", ("yes", "no")))
    answer = spin(
        rng,
        "No, [there is no {n}|I cannot see a {n}|the picture has no {n}]. "
        "[What I see is|The picture shows|It only shows|Instead there is] {l}.",
        n=name,
        l=listing(rng, list(scene.things), places=rng.random() < 0.3),
    )
    return Turn(question, answer, choice_key("no", ("yes", "no")))


def ask_relation(rng: random.Random, scene: Scene) -> Turn | None:
    """Is the circle left of the star or right of it?"""
    unique = scene.unique("short")
    pairs = [(a, b) for a in unique for b in unique if a.row != b.row or a.column != b.column]
    pairs = [(a, b) for a, b in pairs if (a.row == b.row) != (a.column == b.column)] or pairs
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    if a.column != b.column and (a.row == b.row or rng.random() < 0.5):
        value = "left" if a.column < b.column else "right"
        phrase, asked = f"to the {value} of", "left or right of"
    else:
        value = "above" if a.row < b.row else "below"
        phrase, asked = value, "above or below"
    question = spin(
        rng,
        "[Where is the {a} compared with the {b}: {q} it?|Is the {a} {q} the {b}?"
        "|Tell me whether the {a} is {q} the {b}.]",
        a=a.short,
        b=b.short,
        q=asked,
    )
    answer = spin(
        rng,
        "[The {a} is {r} the {b}.|It is {r} the {b}.|You find the {a} {r} the {b}.] "
        "[The first one is {p}, the other one is {o}.|One is {p} and the other is {o}."
        "|The {s} is {p}, while the {u} is {o}.]",
        a=a.short,
        b=b.short,
        r=phrase,
        s=a.shape,
        u=b.shape,
        p=place_phrase(rng, a.cell),
        o=place_phrase(rng, b.cell),
    )
    options = ("left", "right") if value in ("left", "right") else ("above", "below")
    return Turn(question, answer, choice_key(value, options))


def ask_where(rng: random.Random, scene: Scene) -> Turn | None:
    """Where is the red circle?"""
    asked = _ask_about(
        rng,
        scene,
        "short",
        "[Where is the {n}?|Where can I find the {n}?|In which part of the picture is the {n}?]",
        "[The {n} is|It is|You can find it|The {z} {n} sits] {p}.",
    )
    if asked is None:
        return None
    t, question, answer = asked
    if t.cell == 4:
        answer = answer.replace("in the centre of the picture", "in the middle of the picture")
    return Turn(question, f"{answer} {_aside(rng, scene, t)}", choice_key(PLACES[t.cell], PLACES))


ASKERS = (
    ask_at_place,
    ask_colour,
    ask_shape,
    ask_presence,
    ask_relation,
    ask_where,
    ask_size,
)


def vqa_turn(rng: random.Random, scene: Scene) -> Turn:
    """A question that this scene can answer."""
    while True:
        turn = rng.choice(ASKERS)(rng, scene)
        if turn is not None:
            return Turn(turn.question, capital(turn.answer), turn.key)


def follow_up(rng: random.Random, scene: Scene, turn: Turn) -> Turn:
    """The turn reworded as a later question of a conversation."""
    lead = pick(rng, ("", "And now: ", "Thanks. ", "OK. ", "Another question. ", "Good. "))
    return Turn(lead + turn.question, turn.answer, turn.key)
