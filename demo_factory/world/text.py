"""Text-only instructions: arithmetic, comparing, ordering, lists, rewriting, facts."""

import random
from dataclasses import dataclass

from .base import NUMBER_WORDS, Turn, article, capital, choice_key, join_words, spin
from .scene import COLOURS, SHAPES
from .signs import WORDS

SIDES = {"triangle": 3, "square": 4, "diamond": 4, "circle": 0, "ring": 0}
MIXES = {
    ("red", "yellow"): "orange",
    ("blue", "yellow"): "green",
    ("blue", "red"): "purple",
    ("red", "white"): "pink",
    ("black", "white"): "grey",
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TASKS = (
    "add",
    "subtract",
    "larger",
    "order",
    "shout",
    "reverse",
    "list",
    "sides",
    "mix",
    "day",
    "first",
)


@dataclass(frozen=True)
class Task:
    """A task and its operands."""

    name: str
    operands: tuple


def make_task(rng: random.Random) -> Task:
    """Draw a task with operands."""
    name = rng.choice(TASKS)
    operands: tuple = ()
    if name in ("add", "subtract", "larger"):
        operands = tuple(rng.sample(range(1, 21), 2))
    elif name == "order":
        operands = tuple(rng.sample(range(1, 41), rng.randint(3, 4)))
    elif name in ("shout", "reverse"):
        operands = tuple(w.lower() for w in rng.sample(WORDS, 3))
    elif name == "list":
        kind = rng.choice(("shapes", "colours", "days", "signs"))
        operands = (kind, rng.randint(2, 4), rng.randrange(200))
    elif name == "sides":
        operands = (rng.choice(list(SIDES)), rng.randrange(200))
    elif name == "mix":
        operands = (rng.choice(list(MIXES)), rng.randrange(200))
    elif name == "day":
        operands = (rng.choice(DAYS), rng.choice(("after", "before")), rng.randrange(200))
    elif name == "first":
        operands = tuple(w.lower() for w in rng.sample(WORDS, 2))
    return Task(name, operands)


# Questions and answers about a and b, the higher (h) and the lower (l) of them, their sum (v) and
# their difference (d).
ARITHMETIC = {
    "add": (
        "[What is {a} plus {b}?|Add {a} and {b}.|Calculate {a} + {b}.]",
        "[The sum of {a} and {b} is {v}.|{a} plus {b} is {v}.|Adding {b} to {a} gives {v}.]"
        " [You can check it: {v} minus {b} is {a}.|Taking {b} away from {v} leaves {a}.]",
    ),
    "subtract": (
        "[What is {h} minus {l}?|Subtract {l} from {h}.|Calculate {h} - {l}.]",
        "[The difference of {h} and {l} is {d}.|{h} minus {l} is {d}.|Taking {l} from {h}"
        " leaves {d}.] [You can check it: {d} plus {l} is {h}.|Adding {l} to {d} gives {h}.]",
    ),
    "larger": (
        "[Which number is larger, {a} or {b}?|Is {a} or {b} the larger number?]",
        "[The larger number is {h}.|{h} is larger than {l}.|{h} is the larger one.] "
        "[It exceeds {l} by {d}.|The difference is {d}.|The gap between them is {d}.]",
    ),
}


def _arithmetic(rng: random.Random, task: Task) -> Turn:
    a, b = task.operands
    high, low = max(a, b), min(a, b)
    numbers = {"a": a, "b": b, "h": high, "l": low, "v": a + b, "d": high - low}
    question, answer = (spin(rng, text, **numbers) for text in ARITHMETIC[task.name])
    if task.name == "larger":
        key = choice_key(str(high), (str(a), str(b)))
    else:
        key = _number_key(a + b if task.name == "add" else high - low)
    return Turn(question, answer, key)


def _number_key(value: int) -> dict:
    """The result must stand in the first sentence: matched as `is/gives/leaves VALUE.`"""
    return {
        "type": "phrases",
        "pattern": r"^[^.:]*?(?:is|gives|leaves) (\d+)\.",
        "values": [str(value)],
    }


def _ordering(rng: random.Random, task: Task) -> Turn:
    numbers = list(task.operands)
    down = rng.random() < 0.4
    ordered = sorted(numbers, reverse=down)
    question = spin(
        rng,
        "[Sort these numbers|Put these numbers in order|Order the numbers] from {w}: {l}.",
        w="largest to smallest" if down else "smallest to largest",
        l=", ".join(map(str, numbers)),
    )
    answer = spin(
        rng,
        "[The order is|Sorted, they are|In order:] {l}. [The first of them is {f} and the last "
        "is {e}.|They begin with {f} and end with {e}.]",
        l=", ".join(map(str, ordered)),
        f=ordered[0],
        e=ordered[-1],
    )
    return Turn(
        question,
        answer,
        {
            "type": "sequence",
            "values": [str(n) for n in ordered],
            "options": [str(n) for n in range(1, 41)],
        },
    )


def _rewriting(rng: random.Random, task: Task) -> Turn:
    words = list(task.operands)
    if task.name == "first":
        first = min(words)
        question = spin(
            rng,
            "[Which word comes first in the alphabet, {a} or {b}?|Does {a} or {b} "
            "come first in the alphabet?]",
            a=words[0],
            b=words[1],
        )
        answer = spin(
            rng,
            "[The word {f} comes first.|It is {f}.|{f} comes before {o}.] [It starts "
            "with the letter {x}, and {o} starts with {y}.|Compare the letters {x} and "
            "{y}.]",
            f=first,
            o=max(words),
            x=first[0],
            y=max(words)[0],
        )
        return Turn(question, answer, choice_key(first, words))
    if task.name == "shout":
        question = spin(
            rng,
            "[Write these words in capital letters: {l}.|Put in capitals: {l}.]",
            l=", ".join(words),
        )
        result = [w.upper() for w in words]
        answer = spin(
            rng,
            "[In capital letters: {l}.|Here they are in capitals: {l}.|{l}.] [These "
            "are three words.|All three words are in capitals now.]",
            l=", ".join(result),
        )
    else:
        question = spin(
            rng,
            "[Reverse the order of these words: {l}.|Write the words backwards, last"
            " one first: {l}.]",
            l=", ".join(words),
        )
        result = words[::-1]
        answer = spin(
            rng,
            "[In reverse order: {l}.|The reversed list is {l}.|{l}.] [The last word, "
            "{x}, comes first now.|Now {x} comes first and {y} comes last.]",
            l=", ".join(result),
            x=result[0],
            y=result[-1],
        )
        return Turn(question, answer, {"type": "sequence", "values": result, "options": words})
    return Turn(question, answer, {"type": "sequence", "values": result, "options": result})


def _facts(rng: random.Random, task: Task) -> Turn:
    if task.name == "sides":
        shape = task.operands[0]
        value = NUMBER_WORDS[SIDES[shape]]
        question = spin(
            rng,
            "[How many straight sides does {a} have?|What is the number of straight sides of {a}?]",
            a=article(shape),
        )
        why = {0: "It is round.", 3: "It has three corners too.", 4: "It has four corners too."}
        answer = spin(
            rng,
            "[A {s} has {v} straight sides.|It has {v}.|The number of sides is {v}.] "
            "{w} [So the answer is {v}.|That is why it is {v}.]",
            s=shape,
            v=value,
            w=why[SIDES[shape]],
        )
        return Turn(question, answer, choice_key(value, NUMBER_WORDS[:5]))
    if task.name == "mix":
        a, b = task.operands[0]
        value = MIXES[(a, b)]
        if rng.random() < 0.5:
            a, b = b, a
        question = spin(
            rng,
            "[What colour do you get from {a} and {b}?|Mix {a} with {b}: which colour results?]",
            a=a,
            b=b,
        )
        answer = spin(
            rng,
            "[You get {v} when you mix {a} and {b}.|The result is {v}.|It gives {v}.]"
            " [Both colours go into it in equal parts.|More {a} makes it look more like "
            "{a}.]",
            v=value,
            a=a,
            b=b,
        )
        options = sorted(set(MIXES.values()))
        return Turn(question, answer, choice_key(value, options))
    day, side, _ = task.operands
    step = 1 if side == "after" else -1
    value = DAYS[(DAYS.index(day) + step) % 7]
    other = DAYS[(DAYS.index(day) - step) % 7]
    question = spin(
        rng,
        "[Which day comes {s} {d}?|What day is it the day {s} {d}?|Name the day {s} {d}.]",
        s=side,
        d=day,
    )
    answer = spin(
        rng,
        "[It is {v}.|The day is {v}.|The answer is {v}.] [On the other side of {d} "
        "is {o}.|The day on the other side is {o}.]",
        v=value,
        d=day,
        o=other,
    )
    return Turn(question, answer, choice_key(value, DAYS))


def _listing(rng: random.Random, task: Task) -> Turn:
    kind, number, _ = task.operands
    pool = {
        "shapes": SHAPES,
        "colours": tuple(COLOURS),
        "days": DAYS,
        "signs": tuple(w for w in WORDS if len(w) > 3),
    }[kind]
    chosen = rng.sample(pool, number)
    noun = {"signs": "words that can be on a sign", "days": "days of the week"}.get(kind, kind)
    question = spin(
        rng,
        "[Name {n} {k}.|List {n} {k}.|Give me {n} {k}, please.]",
        n=NUMBER_WORDS[number],
        k=noun,
    )
    answer = spin(
        rng,
        "[Here are {n}:|Sure, {n} of them:|I can name {n}:] {l}. [There are others as"
        " well.|Many more exist.|You could also take {o}.]",
        n=NUMBER_WORDS[number],
        l=join_words(chosen),
        o=rng.choice([p for p in pool if p not in chosen]),
    )
    return Turn(question, answer, {"type": "members", "options": list(pool), "count": number})


def text_turn(rng: random.Random, task: Task) -> Turn:
    """The task in words, with its answer."""
    maker = {
        "add": _arithmetic,
        "subtract": _arithmetic,
        "larger": _arithmetic,
        "order": _ordering,
        "shout": _rewriting,
        "reverse": _rewriting,
        "first": _rewriting,
        "list": _listing,
    }.get(task.name, _facts)
    turn = maker(rng, task)
    return Turn(turn.question, capital(turn.answer), turn.key)
