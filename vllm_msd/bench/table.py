"""What the terminal shows: a line for each batch size as it is done, and the figures at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_msd.bench.arms import NONE, Arm
from vllm_msd.bench.drive import Cell
from vllm_msd.measure.report.parts import number, times

_WIDTH = 17


def heading(arms: Sequence[Arm]) -> str:
    """Above the lines."""
    names = "".join(f"{arm.name:>{_WIDTH}}" for arm in arms)
    return f"\n{'tokens/s (of none)':<24}{names}"


def line(temperature: float, batch: int, turn: int, cells: Mapping[str, Cell]) -> str:
    """One pass of one batch size: tokens per second of each arm, and its speed-up."""
    rates = {name: cell.tokens / cell.seconds for name, cell in cells.items()}
    parts = [
        f"{rate:.1f}" + ("" if name == NONE else f" ({times(rate / rates[NONE])})")
        for name, rate in rates.items()
    ]
    label = f"batch {batch}, T={temperature:g}, pass {turn + 1}"
    return f"{label:<24}" + "".join(f"{part:>{_WIDTH}}" for part in parts)


def closing_table(found: Mapping[str, Any]) -> str:
    """The medians of all passes, with their spread, acceptance and answers that differ."""
    shape = found.get("shape")
    last = ("decoding alone", "outputs") if shape else ("of the ideal", "identical")
    head = ("", "tokens/s", "of none", "passes", "a verification", *last)
    lines = [f"\n{head[0]:<14}" + "".join(f"{name:>16}" for name in head[1:])]
    if shape:
        lines.insert(0, f"\n{shape['name']}, random weights: {shape['note']}")
    for cell in found["cells"]:
        distinct = cell["arms"][NONE]["distinct_requests"]
        lines.append(
            f"batch {cell['batch']}, temperature {cell['temperature']:g}: {distinct} distinct "
            "requests, counted anew in each pass"
        )
        for name, one in cell["arms"].items():
            low, high = min(one["speedup_per_pass"]), max(one["speedup_per_pass"])
            columns = (
                number(one["tokens_per_second"], 1),
                times(one["speedup"]),
                f"{low:.2f} to {high:.2f}",
                number(one["acceptance_length"]),
                times(one["decode_speedup"]) if shape else _percent(one["share_of_ideal_speedup"]),
                "not compared" if shape else identity(one),
            )
            lines.append(f"  {name:<12}" + "".join(f"{text:>16}" for text in columns))
        if auto := cell.get("auto"):
            lines.append(
                f"  auto is {times(auto['of_best_fixed'])} of {auto['best_fixed']}, the best that "
                "is fixed"
            )
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.0%}"


def identity(one: Mapping[str, Any]) -> str:
    """How many of an arm's answers are those of no speculation; near ties are named."""
    if "identical" not in one:
        return "drawn"
    text = f"{one['identical']} of {one['requests']}"
    if one["near_ties"]:
        text += f" +{one['near_ties']} ties"
    return text
