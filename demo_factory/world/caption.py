"""Captions of scenes, 60 to 150 tokens long, with varied wording and order."""

import random
import re
from collections import Counter

from .base import NUMBER_WORDS, Turn, article, capital, pick, spin
from .scene import COLOURS, SHAPES, SIZES, Scene, place_phrase

PATTERN = "(?:" + "|".join(SIZES) + ") (?:" + "|".join(COLOURS) + ") (?:" + "|".join(SHAPES) + ")"

QUESTION = (
    "[Describe the picture.|Describe this image in detail.|What does the picture show?"
    "|Write a caption for this image.|Tell me what you see in the picture."
    "|Give a full description of the scene.]"
)
OPENING = (
    "[The|This] [picture|image|scene] [shows|contains|has|presents] {n} {o} on a {g} "
    "[background|ground|surface]."
    "|On a {g} [background|ground], [the picture|this image] [shows|has] {n} {o}."
    "|[We|You can|I] see {n} {o} on a [plain|simple] {g} [background|ground]."
)
MIDDLE = (
    "{P} [there is|I see|you find|we have] {t}.",
    "{T} [is|sits|can be seen|lies] {p}.",
    "[Then there is|There is also|Next comes|One also sees] {t} {p}.",
    "[The|One] object {p} is {t}.",
)


def _closing(rng: random.Random, scene: Scene) -> list[str]:
    """Closing remarks that are true of the scene, in random order."""
    colours = Counter(t.colour for t in scene.things)
    colour, most = colours.most_common(1)[0]
    remarks = []
    if most > 1:
        remarks.append(
            spin(
                rng,
                "[The most common colour is {c}.|{C} is the colour seen most often.]",
                c=colour,
                C=capital(colour),
            )
        )
    elif len(scene.things) > 1:
        remarks.append(
            spin(rng, "[Every object has its own colour.|No two objects share a colour.]")
        )
    sizes = {t.size for t in scene.things}
    if len(sizes) == 1:
        remarks.append(
            spin(rng, "[All|Each] of them [are|is] {z}.", z=sizes.pop())
            .replace("All of them is", "All of them are")
            .replace("Each of them are", "Each of them is")
        )
    else:
        large = sum(t.size == "large" for t in scene.things)
        remarks.append(
            spin(
                rng,
                "[Of these, {l} [is|are] large and {s} small.|The large ones number {l}, the "
                "small ones {s}.]",
                l=NUMBER_WORDS[large],
                s=NUMBER_WORDS[len(scene.things) - large],
            )
        )
    empty = [
        name
        for row, name in enumerate(("top", "middle", "bottom"))
        if not any(t.row == row for t in scene.things)
    ]
    if empty:
        remarks.append(
            spin(
                rng,
                "[The {r} row is empty.|Nothing is in the {r} row.|The {r} row has no object"
                " at all.]",
                r=pick(rng, empty),
            )
        )
    else:
        remarks.append(spin(rng, "[No row is empty.|Every row holds something.]"))
    rng.shuffle(remarks)
    return remarks


def caption_turn(rng: random.Random, scene: Scene) -> Turn:
    """A caption of the whole scene."""
    number = len(scene.things)
    opening = spin(
        rng,
        f"[{OPENING}]",
        n=NUMBER_WORDS[number],
        g=scene.ground,
        o=pick(rng, ("objects", "shapes", "things")) if number > 1 else "object",
    )
    sentences = [capital(opening)]
    things = list(scene.things)
    if rng.random() < 0.3:
        things.reverse()
    for thing in things:
        place = place_phrase(rng, thing.cell)
        name = article(thing.name)
        sentences.append(
            spin(rng, pick(rng, MIDDLE), P=capital(place), p=place, t=name, T=capital(name))
        )
    remarks = _closing(rng, scene)
    sentences += remarks if number < 4 else remarks[:2]
    if number < 4:
        sentences.append(
            spin(
                rng,
                "[The rest of the picture is empty, and the {g} ground is plain."
                "|Apart from that there is nothing but the plain {g} ground."
                "|Nothing else can be seen on the plain {g} ground.]",
                g=scene.ground,
            )
        )
    key = {
        "type": "phrases",
        "pattern": PATTERN,
        "values": sorted({t.name for t in scene.things}),
    }
    return Turn(spin(rng, QUESTION), re.sub(r" +", " ", " ".join(sentences)), key)
