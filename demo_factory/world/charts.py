"""Bar and line charts in coarse steps: content, drawing and chart questions."""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .base import IMAGE_SIZE, NUMBER_WORDS, Turn, capital, choice_key, join_words, spin
from .signs import font

LABELS = {
    "months": ("Jan", "Feb", "Mar", "Apr", "May"),
    "days": ("Mon", "Tue", "Wed", "Thu", "Fri"),
    "letters": ("A", "B", "C", "D", "E"),
}
TOPICS = ("sales", "rain", "visitors", "books", "apples", "trains", "points", "snow")
INKS = {
    "red": (205, 40, 40),
    "green": (40, 150, 70),
    "blue": (50, 90, 215),
    "orange": (245, 140, 30),
    "purple": (130, 60, 170),
    "black": (40, 40, 40),
}
STEPS = tuple(range(10, 90, 10))
VALUES = tuple(str(v) for v in STEPS)
# Plot box in pixels; ten units of value are ten pixels high.
LEFT, BASE = 17, 98


@dataclass(frozen=True)
class Chart:
    """A chart of one series; labels are the first of a label set."""

    form: str
    topic: str
    ink: str
    labels: tuple[str, ...]
    values: tuple[int, ...]


def make_chart(rng: random.Random) -> Chart:
    """Draw a bar or line chart of three to five values between 10 and 80."""
    count = rng.randint(3, 5)
    return Chart(
        rng.choice(("bar", "line")),
        rng.choice(TOPICS),
        rng.choice(list(INKS)),
        rng.choice(list(LABELS.values()))[:count],
        tuple(rng.choice(STEPS) for _ in range(count)),
    )


def draw_chart(chart: Chart) -> Image.Image:
    """The chart as an RGB image of IMAGE_SIZE squared."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for value in (20, 40, 60, 80):
        draw.line((LEFT, BASE - value, IMAGE_SIZE - 2, BASE - value), (205, 205, 205))
        draw.text((LEFT - 2, BASE - value), str(value), (60, 60, 60), font(11), anchor="rm")
    draw.line((LEFT, BASE, IMAGE_SIZE - 2, BASE), (60, 60, 60))
    draw.text((64, 7), chart.topic, (20, 20, 20), font(13), anchor="mm")
    ink = INKS[chart.ink]
    points = []
    for index, (label, value) in enumerate(zip(chart.labels, chart.values, strict=True)):
        x = LEFT + 10 + 19 * index
        points.append((x, BASE - value))
        draw.text((x, BASE + 7), label, (40, 40, 40), font(10), anchor="mm")
        if chart.form == "bar":
            draw.rectangle((x - 6, BASE - value, x + 6, BASE - 1), ink)
    if chart.form == "line":
        draw.line(points, ink, 3)
        for x, y in points:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), ink)
    return image


def chart_labels(chart: Chart) -> dict[str, int]:
    """Slot labels for the vision warm-up: values by position (0 = none), form, topic, ink, set."""
    labels = {f"value{i}": 0 for i in range(5)}
    for index, value in enumerate(chart.values):
        labels[f"value{index}"] = value // 10
    labels["form"] = int(chart.form == "line")
    labels["topic"] = TOPICS.index(chart.topic)
    labels["ink"] = list(INKS).index(chart.ink)
    labels["labels"] = [s[0] for s in LABELS.values()].index(chart.labels[0])
    return labels


def _readings(rng: random.Random, chart: Chart) -> str:
    form = rng.choice(("{n} is {v}", "{n} has {v}", "{n}: {v}", "{v} for {n}"))
    pairs = zip(chart.labels, chart.values, strict=True)
    return join_words([form.format(n=n, v=v) for n, v in pairs])


def _remark(rng: random.Random, chart: Chart) -> str:
    i = rng.randrange(len(chart.values))
    return spin(
        rng,
        "[For comparison, {n} has {v}.|The chart is a {c} {f} chart of {t}.|The {t} for {n} come to"
        " {v}.|It is a {f} chart in {c}, about {t}.]",
        n=chart.labels[i],
        v=chart.values[i],
        c=chart.ink,
        f=chart.form,
        t=chart.topic,
    )


def ask_value(rng: random.Random, chart: Chart) -> Turn:
    """What is the value for Mar?"""
    i = rng.randrange(len(chart.values))
    name, value = chart.labels[i], chart.values[i]
    question = spin(
        rng,
        "[What is the value for {n}?|How many {t} does the chart show for {n}?|Read the value of"
        " {n}.|What does the chart show for {n}?]",
        n=name,
        t=chart.topic,
    )
    mark = "bar" if chart.form == "bar" else "point"
    answer = spin(
        rng,
        "[The value for {n} is {v}.|It is {v}.|The chart shows {v} for {n}.|{n} has {v}.] "
        "[The {m} reaches the height of {v}.|I read this from the {c} {m}.|The {c} {m} ends at {v}"
        " on the axis.]",
        n=name,
        v=value,
        m=mark,
        c=chart.ink,
    )
    return Turn(question, f"{answer} {_remark(rng, chart)}", choice_key(str(value), VALUES))


def ask_extreme(rng: random.Random, chart: Chart) -> Turn | None:
    """Which label has the highest value?"""
    end = rng.choice(("highest", "lowest"))
    best = max(chart.values) if end == "highest" else min(chart.values)
    if chart.values.count(best) > 1:
        return None
    name = chart.labels[chart.values.index(best)]
    question = spin(
        rng,
        "[Which one has the {e} value?|Where are the {t} {e}?|What is the {e} point of the chart?]",
        e=end,
        t=chart.topic,
    )
    answer = spin(
        rng,
        "[{n} has the {e} value, which is {v}.|The {e} value is {v}, for {n}.|It is {n}, with {v}."
        "|The {t} are {e} for {n}, with {v}.] "
        "[The values are: {r}.|All in all I read: {r}.|Reading from left to right: {r}.]",
        n=name,
        e=end,
        v=best,
        t=chart.topic,
        r=_readings(rng, chart),
    )
    return Turn(question, answer, choice_key(name, chart.labels))


def ask_difference(rng: random.Random, chart: Chart) -> Turn | None:
    """By how much do two labels differ?"""
    i, j = rng.sample(range(len(chart.values)), 2)
    if chart.values[i] < chart.values[j]:
        i, j = j, i
    if chart.values[i] == chart.values[j]:
        return None
    a, b, x, y = chart.labels[i], chart.labels[j], chart.values[i], chart.values[j]
    question = spin(
        rng,
        "[How much higher is {a} than {b}?|What is the difference between {a} and {b}?"
        "|By how much does {a} exceed {b}?]",
        a=a,
        b=b,
    )
    answer = spin(
        rng,
        "[{a} has {x} and {b} has {y}.|The value of {a} is {x}, that of {b} is {y}."
        "|I read {x} for {a} and {y} for {b}.] [So the difference is {d}.|{x} minus {y} is {d}."
        "|That gives a gap of {d}.]",
        a=a,
        b=b,
        x=x,
        y=y,
        d=x - y,
    )
    return Turn(question, answer, choice_key(str(x - y), VALUES, "last"))


def ask_trend(rng: random.Random, chart: Chart) -> Turn | None:
    """Is the last value higher than the first?"""
    first, last = chart.values[0], chart.values[-1]
    if first == last:
        return None
    value = "higher" if last > first else "lower"
    question = spin(
        rng,
        "[Is the last value higher or lower than the first?|Does the chart end higher or lower"
        " than it starts?|Compare the end of the chart with its start.]",
    )
    answer = spin(
        rng,
        "[It ends {w}.|The last value is {w} than the first.|The end is {w} than the start.] "
        "[It starts with {x} at {a} and ends with {y} at {b}.|{a} has {x}, while {b} has {y}."
        "|At {a} it is {x} and at {b} it is {y}.]",
        w=value,
        x=first,
        y=last,
        a=chart.labels[0],
        b=chart.labels[-1],
    )
    return Turn(question, f"{answer} {_remark(rng, chart)}", choice_key(value, ("higher", "lower")))


def ask_above(rng: random.Random, chart: Chart) -> Turn:
    """How many values are above 40?"""
    limit = rng.choice((20, 30, 40, 50, 60))
    names = [n for n, v in zip(chart.labels, chart.values, strict=True) if v > limit]
    mark = "bars" if chart.form == "bar" else "points"
    question = spin(
        rng,
        "[How many {m} are above {l}?|Count the {m} higher than {l}.|How many values exceed {l}?]",
        m=mark,
        l=limit,
    )
    body = spin(
        rng,
        "[I read the values: {r}.|The values are: {r}.|From left to right: {r}.]",
        r=_readings(rng, chart),
    )
    if names:
        end = spin(
            rng,
            "[Above {l} I find {n}, so the count is {k}.|Those above {l} are {n}: {k} in all.]",
            l=limit,
            n=join_words(list(names)),
            k=NUMBER_WORDS[len(names)],
        )
    else:
        end = spin(
            rng, "[None is above {l}, so the count is zero.|The count above {l} is zero.]", l=limit
        )
    key = choice_key(NUMBER_WORDS[len(names)], NUMBER_WORDS[:6], "last")
    return Turn(question, f"{body} {end}", key)


def ask_all(rng: random.Random, chart: Chart) -> Turn:
    """What does the chart show?"""
    question = spin(
        rng,
        "[What does the chart show?|Describe the chart.|List all the values.|Explain this chart.]",
    )
    answer = spin(
        rng,
        "[This is|The picture shows|We see] a {f} chart [of|about] {t}[| in {c}]. "
        "[It has {k} values.|There are {k} values.] "
        "[From left to right: {r}.|The values are: {r}.]",
        f=chart.form,
        t=chart.topic,
        c=chart.ink,
        k=NUMBER_WORDS[len(chart.values)],
        r=_readings(rng, chart),
    )
    key = {
        "type": "sequence",
        "values": list(dict.fromkeys(str(v) for v in chart.values)),
        "options": list(VALUES),
    }
    return Turn(question, answer, key)


ASKERS = (ask_value, ask_extreme, ask_difference, ask_trend, ask_above, ask_all)


def chart_turn(rng: random.Random, chart: Chart) -> Turn:
    """A question that this chart can answer."""
    while True:
        turn = rng.choice(ASKERS)(rng, chart)
        if turn is not None:
            return Turn(turn.question, capital(turn.answer), turn.key)
