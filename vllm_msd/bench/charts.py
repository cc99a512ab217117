"""Charts of a run, as PNG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_msd.bench.arms import NONE
from vllm_msd.storage import replacing

COLOURS = ("#848d97", "#b07aa1", "#3d82d6", "#c2681a", "#0b7a75", "#d1495b", "#7a5195")


def draw(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw throughput, speed-up and acceptance by kind; returns the files."""
    from matplotlib.figure import Figure

    drawn = []
    for temperature in dict.fromkeys(cell["temperature"] for cell in found["cells"]):
        cells = [cell for cell in found["cells"] if cell["temperature"] == temperature]
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        rates, speedups = figure.subplots(1, 2)
        batches = [cell["batch"] for cell in cells]
        for name, colour in zip(found["arms"], _colours(len(found["arms"])), strict=True):
            arms = [cell["arms"][name] for cell in cells]
            middle = [one["tokens_per_second"] for one in arms]
            rates.errorbar(batches, middle, _spread(arms, "tokens_per_second"), label=_text(name),
                           color=colour, marker=".", capsize=3)  # fmt: skip
            middle = [one["speedup"] for one in arms]
            speedups.errorbar(batches, middle, _spread(arms, "speedup"), label=_text(name),
                              color=colour, marker=".", capsize=3)  # fmt: skip
        rates.set_title("tokens per second, prompts included")
        speedups.set_title("speed-up over no speculation")
        for axes in (rates, speedups):
            axes.set_xscale("log", base=2)
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.set_xlabel("requests at a time")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        note = f"temperature {temperature:g}; bars: lowest and highest pass; {found['date']}"
        if shape := found.get("shape"):
            note = f"{shape['name']}, random weights: {shape['note']}; {note}"
        figure.suptitle(note, fontsize="small")
        drawn.append(_save(figure, folder / f"speed-temperature-{temperature:g}.png"))

    first = found["cells"][0]
    kinds = list(next(iter(first["arms"].values()))["by_kind"])
    names = [name for name in found["arms"] if name != NONE]
    figure = Figure(figsize=(11, 1.5 + 0.22 * len(kinds) * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(names)
    for index, (name, colour) in enumerate(
        zip(names, _colours(len(found["arms"]))[1:], strict=True)
    ):
        by_kind = first["arms"][name]["by_kind"]
        values = [by_kind[kind]["tokens_per_step"] or 0 for kind in kinds]
        places = [row + (index - (len(names) - 1) / 2) * height for row in range(len(kinds))]
        axes.barh(places, values, height=0.9 * height, color=colour, label=_text(name))
    axes.set_yticks(range(len(kinds)), [_text(kind) for kind in kinds])
    axes.invert_yaxis()
    axes.set_xlabel("tokens of a request in each step of the target")
    axes.set_title(f"batch {first['batch']}, temperature {first['temperature']:g}")
    axes.legend(fontsize="small")
    drawn.append(_save(figure, folder / "kinds.png"))
    return drawn


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _spread(arms: list[Mapping[str, Any]], name: str) -> list[list[float]]:
    """Below and above the median, as error bars want it."""
    return [
        [one[name] - min(one[f"{name}_per_pass"]) for one in arms],
        [max(one[f"{name}_per_pass"]) - one[name] for one in arms],
    ]


def _text(name: str) -> str:
    return name.replace("$", r"\$")  # no formula


def _save(figure: Any, path: Path) -> Path:
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    return path
