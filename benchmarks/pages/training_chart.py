"""The charts of docs/training.md: tokens per verification by kind of work, and acceptance by depth.

What a chart shows is written into it as its description (see `chart`).
"""

from pathlib import Path
from statistics import mean
from typing import Any

from .chart import INK, description

# By result file, as docs/training.md sees it from its folder.
PICTURES = {
    "benchmarks/results/training.json": "pictures/training.svg",
    "benchmarks/results/training_walk.json": "pictures/training_walk.svg",
}
# The comparisons that are drawn, as far as a result has two of their variants.
COMPARISONS = {
    "Visual rows": ["msd", "coupled", "dropped"],
    "Curriculum": ["msd", "published-ramp", "text-only", "multimodal-only", "mixed"],
    "Drafting steps in training": ["msd", "three-step"],
    "Visual rows, three steps": ["three-step", "three-step-coupled", "three-step-dropped"],
    "Loss, three steps": ["three-step", "kl", "lk"],
}


def counted(ways: dict[str, Any]) -> dict[str, Any]:
    """A variant's figures as vLLM counted them; by `vllm-msd eval` where vLLM cannot serve it."""
    return ways.get("vllm", ways["eval"])


def content(result: dict[str, Any]) -> dict[str, Any]:
    """What a chart shows, from its result file."""
    variants = result["summary"]
    depth = result["settings"].get("num_speculative_tokens", 5)
    found: dict[str, Any] = {"comparisons": {}, "by_depth": {}}
    for title, names in COMPARISONS.items():
        there = [name for name in names if name in variants]
        if len(there) > 1:
            found["comparisons"][title] = {
                name + ("" if "vllm" in variants[name] else " (vllm-msd eval)"): {
                    kind: [round(length, 3) for length in lengths]
                    for kind, lengths in counted(variants[name])["lengths"].items()
                }
                for name in there
            }
    for name, ways in variants.items():
        # A way of counting may leave out the depths that nothing reached.
        rows = [[*row, *[0.0] * (depth - len(row))] for row in counted(ways)["at_depth"]]
        found["by_depth"][name] = [round(mean(column), 3) for column in zip(*rows, strict=True)]
    return found


def draw(wanted: dict[str, Any], path: Path) -> None:
    """Means as bars, seeds as dots, and acceptance by depth."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = {
        f"{part}.{of}color" if of else f"{part}.color": INK
        for part, of in (("text", ""), ("xtick", ""), ("ytick", ""), ("axes", "label"))
    }
    style = {"svg.hashsalt": "vllm-msd", "axes.edgecolor": INK, "axes.titlecolor": INK, **colours}
    with matplotlib.rc_context(style):
        panels = len(wanted["comparisons"]) + 1
        rows = -(-panels // 2)
        figure = Figure(figsize=(13, 3.6 * rows), layout="constrained")
        axes = list(figure.subplots(rows, 2, squeeze=False).flatten())
        for place, (title, variants) in zip(axes, wanted["comparisons"].items(), strict=False):
            _bars(place, title, variants)
        _depths(axes[panels - 1], wanted["by_depth"])
        for unused in axes[panels:]:
            unused.axis("off")
        about = {"Date": None, "Creator": None, "Description": description(wanted)}
        figure.savefig(path, transparent=True, metadata=about)


def _bars(axes: Any, title: str, variants: dict[str, dict[str, list[float]]]) -> None:
    kinds = list(next(iter(variants.values())))
    width = 0.8 / len(variants)
    for i, (name, lengths) in enumerate(variants.items()):
        at = [k + (i - (len(variants) - 1) / 2) * width for k in range(len(kinds))]
        axes.bar(at, [mean(lengths[kind]) for kind in kinds], width * 0.92, label=name, alpha=0.75)
        for x, kind in zip(at, kinds, strict=True):
            axes.plot([x] * len(lengths[kind]), lengths[kind], ".", color=INK, markersize=3)
    axes.set_xticks(range(len(kinds)), kinds, rotation=20)
    axes.set_ylim(1, 1 + 1.35 * (axes.get_ylim()[1] - 1))  # room for the legend
    axes.set_ylabel("tokens per verification")
    axes.set_title(title)
    axes.legend(fontsize="small", ncols=3, loc="upper left", framealpha=0)
    axes.grid(axis="y", alpha=0.3)


def _depths(axes: Any, by_depth: dict[str, list[float]]) -> None:
    for name, shares in by_depth.items():
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=name)
    axes.set_xticks(range(1, 1 + max(map(len, by_depth.values()))))
    axes.set_xlabel("drafted tokens")
    axes.set_title("Share of verifications that accept so many or more")
    axes.legend(fontsize="small", framealpha=0)
    axes.grid(alpha=0.3)
