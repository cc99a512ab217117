"""Signs with rendered words and numbers: content, drawing and text questions."""

import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from .base import IMAGE_SIZE, NUMBER_WORDS, Turn, capital, choice_key, join_words, spin

_WORD_LIST = """
BAKER BANK BARN BEAR BIKE BIRD BOAT BOOK BREAD BUS CAFE CAKE CAMP CAR CASH CHEF CITY CLUB COAT
COIN COLD COOK CORN DESK DOCK DOG DOOR DRUM EAST EXIT FARM FILM FIRE FISH FOOD FOREST FUEL GATE
GIFT GOLD GOLF HALL HAT HERB HOME HOT HOTEL ICE INN JAZZ KEY KING LAKE LAMP LEFT LION LUNCH
MAIN MAP MEAL MENU MILK MOON NEWS NORTH OPEN PARK PIER PIZZA PLAZA POOL POST PUB RADIO RAIN
RICE RIVER ROAD ROCK ROOM SALE SALT SHIP SHOE SHOP SNOW SOAP SOUP SPA STOP SUN TAXI TEA TIME
TOY TRAIN TREE WEST WOOD ZOO
"""
WORDS = tuple(_WORD_LIST.split())
PLATES = {
    "red": (190, 30, 35),
    "green": (25, 125, 50),
    "blue": (35, 70, 190),
    "yellow": (250, 222, 60),
    "white": (255, 255, 255),
    "black": (25, 25, 25),
}
ROWS = ("top", "middle", "bottom")
_DARK_TEXT = ("yellow", "white")
NUMBERS = tuple(str(n) for n in range(10, 100))
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
LETTER_COLUMNS = 8
TEXT_SIZE = 19


@dataclass(frozen=True)
class Sign:
    """A plate in a row (0-2) with a word or a two-digit number."""

    row: int
    plate: str
    text: str


@dataclass(frozen=True)
class Street:
    """Signs, ordered from top to bottom, all of different plate colours."""

    signs: tuple[Sign, ...]
    jitter: int


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def make_street(rng: random.Random) -> Street:
    """Draw one to three signs; about a quarter hold numbers."""
    rows = sorted(rng.sample(range(3), rng.randint(1, 3)))
    plates = rng.sample(list(PLATES), len(rows))
    texts = [rng.choice(NUMBERS) if rng.random() < 0.25 else rng.choice(WORDS) for _ in rows]
    while len(set(texts)) < len(texts):
        texts = [rng.choice(WORDS) for _ in rows]
    signs = tuple(Sign(r, p, t) for r, p, t in zip(rows, plates, texts, strict=True))
    return Street(signs, rng.randrange(1 << 16))


def _letter_places(sign: Sign) -> list[tuple[int, str]]:
    """Column of LETTER_COLUMNS for each letter: evenly spaced lettering, centred."""
    start = (LETTER_COLUMNS - len(sign.text)) // 2
    return [(start + index, letter) for index, letter in enumerate(sign.text)]


def draw_street(street: Street) -> Image.Image:
    """The street as an RGB image of IMAGE_SIZE squared."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (176, 196, 214))
    draw = ImageDraw.Draw(image)
    shift = random.Random(street.jitter)
    pitch = IMAGE_SIZE / LETTER_COLUMNS
    for sign in street.signs:
        y = 19 + 37 * sign.row + shift.uniform(-1, 1)
        draw.rectangle((5, y - 15, IMAGE_SIZE - 6, y + 15), PLATES[sign.plate], (70, 70, 70))
        ink = (15, 15, 15) if sign.plate in _DARK_TEXT else (255, 255, 255)
        for column, letter in _letter_places(sign):
            draw.text(((column + 0.5) * pitch, y), letter, ink, font(TEXT_SIZE), anchor="mm")
    return image


def street_labels(street: Street) -> dict[str, int]:
    """Slot labels for the vision warm-up, 0 where there is no sign.

    Per row the plate, the text, and what stands at each of LETTER_COLUMNS even steps across:
    a word as a whole is seen too rarely to be learned before its letters.
    """
    labels = {f"row{r}.{part}": 0 for r in range(3) for part in ("plate", "text")}
    labels |= {f"row{r}.letter{c}": 0 for r in range(3) for c in range(LETTER_COLUMNS)}
    for sign in street.signs:
        labels[f"row{sign.row}.plate"] = 1 + list(PLATES).index(sign.plate)
        labels[f"row{sign.row}.text"] = 1 + (WORDS + NUMBERS).index(sign.text)
        for column, letter in _letter_places(sign):
            labels[f"row{sign.row}.letter{column}"] = 1 + LETTERS.index(letter)
    return labels


def _remark(rng: random.Random, street: Street, sign: Sign) -> str:
    others = [s for s in street.signs if s is not sign]
    if not others:
        return spin(rng, "[It is the only sign here.|There is no other sign in the picture.]")
    other = rng.choice(others)
    return spin(
        rng,
        "[The sign at the {r} says {w}.|There is also a {p} sign that says {w}."
        "|Another sign, at the {r}, reads {w}.|The {p} one reads {w}.]",
        r=ROWS[other.row],
        p=other.plate,
        w=other.text,
    )


def _text_key(text: str) -> dict:
    return choice_key(text, NUMBERS if text in NUMBERS else WORDS)


def ask_sign(rng: random.Random, street: Street) -> Turn:
    """What does the red sign say?"""
    sign = rng.choice(street.signs)
    which = rng.choice((f"{sign.plate} sign", f"sign at the {ROWS[sign.row]}"))
    what = "number" if sign.text in NUMBERS else "word"
    question = spin(
        rng,
        "[What does the {w} say?|What is written on the {w}?|Read the {w}.|Which {t} is on the {w}?"
        "|Please read the text on the {w}.]",
        w=which,
        t=what,
    )
    answer = spin(
        rng,
        "[The {w} says {x}.|It says {x}.|It reads {x}.|The {t} on it is {x}.|On the {w} I can read "
        "{x}.] [It is a {p} plate at the {r} of the picture.|The plate is {p} and hangs at the {r}."
        "|This sign is {p} and it is at the {r}.]",
        w=which,
        x=sign.text,
        t=what,
        p=sign.plate,
        r=ROWS[sign.row],
    )
    return Turn(question, f"{answer} {_remark(rng, street, sign)}", _text_key(sign.text))


def ask_all(rng: random.Random, street: Street) -> Turn:
    """Read all the signs."""
    question = spin(
        rng,
        "[Read all the signs.|What text is in the picture?|List everything that is written here."
        "|Which words or numbers can you read?]",
    )
    forms = (
        "the {p} sign says {w}",
        "{w} on the {p} sign at the {r}",
        "{w} on a {p} plate",
        "{w} at the {r}",
    )
    form = rng.choice(forms)
    items = [form.format(p=s.plate, w=s.text, r=ROWS[s.row]) for s in street.signs]
    number = NUMBER_WORDS[len(items)] + (" sign" if len(items) == 1 else " signs")
    verb = "is" if len(items) == 1 else "are"
    answer = spin(
        rng,
        "[There {v} {n}.|I can see {n}.|The picture has {n}.] [From top to bottom I read: {l}."
        "|In order: {l}.|Here is the text: {l}.]",
        v=verb,
        n=number,
        l=join_words(items),
    )
    key = {
        "type": "sequence",
        "values": [s.text for s in street.signs],
        "options": list(WORDS + NUMBERS),
    }
    return Turn(question, answer, key)


def ask_which(rng: random.Random, street: Street) -> Turn:
    """Which sign says CAFE?"""
    sign = rng.choice(street.signs)
    question = spin(
        rng,
        "[Which sign says {w}?|What colour is the sign that says {w}?|Where can I read {w}, and"
        " on what colour?]",
        w=sign.text,
    )
    answer = spin(
        rng,
        "[The {p} sign says {w}.|It is the {p} one.|{w} is on the {p} sign.|That is the {p} sign.] "
        "[It hangs at the {r}.|You find it at the {r} of the picture.|It is the one at the {r}.]",
        p=sign.plate,
        w=sign.text,
        r=ROWS[sign.row],
    )
    turn = Turn(question, f"{answer} {_remark(rng, street, sign)}", choice_key(sign.plate, PLATES))
    return turn


def textvqa_turn(rng: random.Random, street: Street) -> Turn:
    """A question about the text in the picture."""
    ask = rng.choices((ask_sign, ask_all, ask_which), (4, 3, 1.5))[0]
    turn = ask(rng, street)
    return Turn(turn.question, capital(turn.answer), turn.key)
