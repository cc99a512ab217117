"""The sections of docs/kernels.md: launches counted, and steps predicted from them."""

from typing import Any

from .tables import source, table

_KINDS = {"none": "no speculation", "chain": "chain of 5", "tree fused": "tree of 24, depth 5"}


def launches(name: str, result: dict[str, Any]) -> str:
    """Launches of a decoding step by kind and place, now and before."""
    rows = []
    for when, counted in (("", result), (" before", result.get("before"))):
        for kind, label in _KINDS.items() if counted else ():
            counts, step = counted["launches"][kind], counted["steps"][kind]
            graphs = [*step["graphs"], None, None][:3]
            rows.append(
                (label + when, *graphs, counts.get("level"), counts["outside"], step["ours"])
            )
    head = ["a step of one request", "target's graph", "draft's prefill", "draft's levels"]
    head += ["each level", "outside graphs", "of these ours"]
    parts = [
        "### Launches, counted",
        "From the record of emulated CUDA graphs on a CPU; the target is the demo's, which has few "
        "layers. Attention and cache updates count as one each. *Before* trees were laid over a "
        "step, and rows moved along accepted paths, by one launch each; they were drafted in one "
        "graph already. Drafted level by level from Python, a step had about 400.",
        table(head, rows),
        source(name, result),
    ]
    return "\n\n".join(parts)


def roofline(name: str, result: dict[str, Any]) -> str:
    """Predicted step times and speed-ups by device, model and batch."""
    stage = result["settings"]["stages"][-1]
    arms = list(dict.fromkeys(row["drafted"] for row in result["steps"]))
    cells: dict[tuple[str, str, int], list[str]] = {}
    for row in result["steps"]:
        found = [row[stage][edge] for edge in ("hidden", "in_turn")]
        times, gains = ([one[key] for one in found] for key in ("ms", "speedup"))
        text = _range(times, ".1f") + " ms"
        if row["drafted"] != "none":
            text += f", {_range(gains, '.2f')}x"
        cells.setdefault((row["device"], row["model"], row["batch"]), []).append(text)
    rows = [
        (result["devices"][device]["name"], model, batch, *texts)
        for (device, model, batch), texts in cells.items()
    ]
    parts = [
        "### A step, predicted",
        "**Arithmetic, not measured:** the longer of bytes and operations of each part, and the "
        "launches above. Ranges go from launches hidden behind the GPU's work to the GPU waiting "
        "for each of those outside graphs; speed-ups are over no speculation. Assumed tokens per "
        f"verification: {_tokens(result)}; contexts of {result['settings']['context']} tokens.",
        table(["GPU", "model", "requests", *arms], rows),
        f"![Predicted speed-ups by batch](pictures/roofline.png)\n\n{source(name, result)}",
    ]
    return "\n\n".join(parts)


def _range(values: list[float], form: str) -> str:
    return " to ".join(dict.fromkeys(format(value, form) for value in sorted(values)))


def _tokens(result: dict[str, Any]) -> str:
    tokens = {row["drafted"]: row["tokens"] for row in result["steps"] if row["drafted"] != "none"}
    return ", ".join(f"{arm} {value}" for arm, value in tokens.items())
