"""Scenes of coloured shapes on a 3x3 layout: content, drawing and phrases."""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .base import IMAGE_SIZE, article, join_words, pick

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "moon")
COLOURS = {
    "red": (215, 30, 35),
    "green": (30, 150, 55),
    "blue": (40, 80, 225),
    "yellow": (245, 215, 30),
    "orange": (250, 130, 20),
    "purple": (135, 40, 170),
    "pink": (250, 140, 195),
    "brown": (120, 70, 30),
    "black": (20, 20, 20),
}
SIZES = {"small": 8, "large": 15}
GROUNDS = {
    "white": (255, 255, 255),
    "grey": (205, 205, 205),
    "cream": (255, 242, 205),
    "mint": (205, 245, 220),
}
# Position name by cell number, row by row.
PLACES = (
    "top left",
    "top centre",
    "top right",
    "middle left",
    "middle",
    "middle right",
    "bottom left",
    "bottom centre",
    "bottom right",
)
CELL = IMAGE_SIZE / 3


@dataclass(frozen=True)
class Thing:
    """A shape in a cell (0-8, row by row)."""

    cell: int
    size: str
    colour: str
    shape: str

    @property
    def name(self) -> str:
        """Size, colour and shape, as in `large red circle`."""
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def short(self) -> str:
        """Colour and shape, as in `red circle`."""
        return f"{self.colour} {self.shape}"

    @property
    def row(self) -> int:
        """0 at the top."""
        return self.cell // 3

    @property
    def column(self) -> int:
        """0 at the left."""
        return self.cell % 3


@dataclass(frozen=True)
class Scene:
    """Things on a plain ground, ordered by cell."""

    ground: str
    things: tuple[Thing, ...]
    jitter: int

    def unique(self, attribute: str) -> list[Thing]:
        """Things whose value of `attribute` no other thing shares."""
        values = [getattr(thing, attribute) for thing in self.things]
        return [t for t, value in zip(self.things, values, strict=True) if values.count(value) == 1]


def make_scene(rng: random.Random, low: int = 2, high: int = 5) -> Scene:
    """Draw a scene; half of them use few colours and shapes, so that counts above one occur."""
    colours, shapes = list(COLOURS), list(SHAPES)
    if rng.random() < 0.5:
        colours, shapes = rng.sample(colours, 3), rng.sample(shapes, 3)
    cells = sorted(rng.sample(range(9), rng.randint(low, high)))
    things = tuple(
        Thing(cell, rng.choice(list(SIZES)), rng.choice(colours), rng.choice(shapes))
        for cell in cells
    )
    return Scene(rng.choice(list(GROUNDS)), things, rng.randrange(1 << 16))


def _polygon(cx: float, cy: float, radii: list[float], turn: float) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [
        (cx + r * math.sin(turn + i * step), cy - r * math.cos(turn + i * step))
        for i, r in enumerate(radii)
    ]


def _draw_thing(
    draw: ImageDraw.ImageDraw, thing: Thing, cx: float, cy: float, ground: tuple[int, int, int]
) -> None:
    r = SIZES[thing.size]
    fill = COLOURS[thing.colour]
    box = (cx - r, cy - r, cx + r, cy + r)
    if thing.shape == "circle":
        draw.ellipse(box, fill)
    elif thing.shape == "ring":
        draw.ellipse(box, outline=fill, width=max(3, r // 3))
    elif thing.shape == "square":
        draw.rectangle((cx - 0.88 * r, cy - 0.88 * r, cx + 0.88 * r, cy + 0.88 * r), fill)
    elif thing.shape == "triangle":
        draw.polygon([(cx, cy - r), (cx + r, cy + 0.85 * r), (cx - r, cy + 0.85 * r)], fill)
    elif thing.shape == "diamond":
        draw.polygon([(cx, cy - r), (cx + 0.7 * r, cy), (cx, cy + r), (cx - 0.7 * r, cy)], fill)
    elif thing.shape == "star":
        draw.polygon(_polygon(cx, cy, [r, 0.42 * r] * 5, 0.0), fill)
    elif thing.shape == "cross":
        w = 0.32 * r
        draw.rectangle((cx - w, cy - r, cx + w, cy + r), fill)
        draw.rectangle((cx - r, cy - w, cx + r, cy + w), fill)
    else:  # moon
        draw.ellipse(box, fill)
        draw.ellipse((cx - 0.25 * r, cy - 0.95 * r, cx + 1.35 * r, cy + 0.75 * r), ground)


def draw_scene(scene: Scene) -> Image.Image:
    """The scene as an RGB image of IMAGE_SIZE squared."""
    ground = GROUNDS[scene.ground]
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), ground)
    draw = ImageDraw.Draw(image)
    shift = random.Random(scene.jitter)
    for thing in scene.things:
        cx = (thing.column + 0.5) * CELL + shift.uniform(-2.5, 2.5)
        cy = (thing.row + 0.5) * CELL + shift.uniform(-2.5, 2.5)
        _draw_thing(draw, thing, cx, cy, ground)
    return image


def scene_labels(scene: Scene) -> dict[str, int]:
    """Slot labels for the vision warm-up: shape, colour and size per cell (0 = empty)."""
    labels = {f"cell{c}.{part}": 0 for c in range(9) for part in ("shape", "colour", "size")}
    for thing in scene.things:
        labels[f"cell{thing.cell}.shape"] = 1 + SHAPES.index(thing.shape)
        labels[f"cell{thing.cell}.colour"] = 1 + list(COLOURS).index(thing.colour)
        labels[f"cell{thing.cell}.size"] = 1 + list(SIZES).index(thing.size)
    labels["ground"] = list(GROUNDS).index(scene.ground)
    return labels


def place_phrase(rng: random.Random, cell: int) -> str:
    """Where a cell is, as in `in the top left corner`."""
    place = PLACES[cell]
    if cell == 4:
        return pick(rng, ("in the middle", "in the centre of the picture", "right in the middle"))
    if cell in (0, 2, 6, 8):
        return pick(rng, (f"at the {place}", f"in the {place} corner", f"on the {place}"))
    return pick(rng, (f"at the {place}", f"on the {place} side"))


def listing(rng: random.Random, things: list[Thing], places: bool = True) -> str:
    """The things in one phrase, with their places if wanted."""
    parts = []
    for thing in things:
        phrase = article(thing.name)
        parts.append(f"{phrase} {place_phrase(rng, thing.cell)}" if places else phrase)
    return join_words(parts)
