"""The README's chart: acceptance of the demo pair, and the speed of chains and trees.

One SVG for light and dark pages: no background, and colours that stand out from both. What it
shows is written into the file as its description, so that a test can compare it with the figures.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

from .tables import machine

SOURCES = ("benchmarks/results/demo.json", "benchmarks/results/trees.json")
PICTURE = "docs/pictures/decoding.svg"
# Each with a contrast of about 4 on white and on GitHub's dark page.
INK, PLAIN, CHAIN, TREE = "#767f8a", "#848d97", "#3d82d6", "#c2681a"


def content(demo: dict[str, Any], trees: dict[str, Any]) -> dict[str, Any]:
    """What the chart shows, from the two result files."""
    settings = trees["settings"]
    speeds = {"no draft": trees["speed"]["plain_tokens_per_second"]}
    for name, found in trees["speed"]["draftings"].items():
        speeds[name.partition(",")[0].replace(" nodes", "")] = found["msd_tokens_per_second"]
    drafted = demo["settings"]["num_speculative_tokens"]
    lengths = {k: v["acceptance_length"] for k, v in demo["small"]["by_kind"].items()}
    return {
        "acceptance": {
            "title": f"Tokens per verification, {drafted} drafted",
            # Without a draft, a pass of the target gives one token.
            "bars": {"no draft": 1.0}
            | {kind: round(length, 2) for kind, length in lengths.items()},
        },
        "speed": {
            "title": f"Tokens per second, widened to {settings['size']}",
            "bars": {name: round(speed, 1) for name, speed in speeds.items()},
        },
        "note": f"Demo pair, greedy, batch 1, on a CPU ({machine(trees)}).",
    }


def shows(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether the file is a chart of this content."""
    return path.is_file() and escape(description(wanted), quote=False) in path.read_text("utf-8")


def description(wanted: dict[str, Any]) -> str:
    """What a chart's file says it shows."""
    return json.dumps(wanted)


def draw(wanted: dict[str, Any], path: Path) -> None:
    """Draw the chart."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "vllm-msd", "text.color": INK, "font.size": 10.5}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.6, 3.5), layout="constrained")
        for axes, panel in zip(figure.subplots(1, 2), ("acceptance", "speed"), strict=True):
            _bars(axes, wanted[panel]["title"], wanted[panel]["bars"])
        figure.get_layout_engine().set(wspace=0.1)
        figure.supxlabel(wanted["note"], fontsize=9, color=INK)
        about = {"Date": None, "Creator": None, "Description": description(wanted)}
        figure.savefig(path, transparent=True, metadata=about)


def _bars(axes: Any, title: str, values: dict[str, float]) -> None:
    colours = [
        PLAIN if name == "no draft" else TREE if name.startswith("tree") else CHAIN
        for name in values
    ]
    bars = axes.barh(list(values), list(values.values()), height=0.66, color=colours)
    axes.bar_label(bars, padding=5, color=INK)
    axes.set_title(title, fontsize=11.5, color=INK, loc="left", pad=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(values.values()))
    axes.set_xticks([])
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
