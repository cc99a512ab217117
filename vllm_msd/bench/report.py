"""The page of a run: self-contained HTML, made of nothing but the figures."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from vllm_msd.bench.arms import NONE
from vllm_msd.bench.figures import NOT_SLOWER, verdict
from vllm_msd.bench.table import identity
from vllm_msd.measure.report.bars import bars, grouped_bars
from vllm_msd.measure.report.parts import facts, number, panel, style, table, tile, times

TEMPLATE = Path(__file__).with_name("template.html")
_COLOURS = 7  # of arms, in the template

Found = Mapping[str, Any]


def render(found: Found) -> str:
    """The whole page; all text from outside is escaped.

    Args:
        found: what `vllm_msd.bench.run.run_bench` returns.
    """
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        style=style(),
        lead=_lead(found),
        tiles=_tiles(found),
        turns=_turns(found),
        panels="".join(_speed_panel(found, cell) for cell in found["cells"]),
        tables="".join(_table(found, t) for t in _temperatures(found)) + _auto(found),
        ideal=_ideal(found),
        kinds=_kinds(found),
        outputs=_outputs(found),
        facts=facts({**found, "settings": _settings(found)}),
    )


def _turns(found: Found) -> str:
    if found["settings"].get("engines") == "apart":
        return "one engine at a time did all its batch sizes, and who went first rotated by pass"
    return "they took turns, and who went first rotated"


def _settings(found: Found) -> dict[str, Any]:
    """Those that were given or have a value, lists as they are typed; and what auto came to."""
    shown = {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in found["settings"].items()
        if value not in (None, []) and (name != "accepted" or "shape" in found)
    }
    return shown | ({"dtype": found["dtype"]} if "dtype" in found else {})


def _temperatures(found: Found) -> list[float]:
    return list(dict.fromkeys(cell["temperature"] for cell in found["cells"]))


def _colour(found: Found, name: str) -> str:
    return f"arm{list(found['arms']).index(name) % _COLOURS}"


def _name(kind: str) -> str:
    """A kind of work as the demo calls it, or as it is."""
    from vllm_msd.demo.samples import KIND_NAMES

    return KIND_NAMES.get(kind, kind)


def _lead(found: Found) -> str:
    settings, data = found["settings"], found["data"]
    if shape := found.get("shape"):
        return f"<b>{escape(shape['note'][0].upper() + shape['note'][1:])}.</b> " + escape(
            f"Random weights in the shape of {shape['name']} and of its draft. A verification "
            "accepts what a draw says, and the text is noise: a tree of 60 nodes, 6 deep and "
            f"top-k 10, yields {shape['tokens_of_a_tree_of_60']:g} tokens, and other trees and "
            f"chains what the same draft would. {data['requests']} requests from "
            f"{data['source']}, {settings['passes']} passes. {found['date']}."
        )
    target = settings["target"] or (
        f"the demo pair widened to {settings['wide']} parameters"
        if settings["wide"]
        else "the demo pair, which is so small that all is overhead"
    )
    return escape(
        f"Target: {target}. {data['requests']} requests from {data['source']}, "
        f"{settings['passes']} passes. {found['date']}."
    )


def _tiles(found: Found) -> str:
    tiles = []
    for cell in found["cells"]:
        if cell["temperature"] != found["cells"][0]["temperature"]:
            continue
        if cell["batch"] not in (found["cells"][0]["batch"], _largest(found)):
            continue
        others = {name: one for name, one in cell["arms"].items() if name != NONE}
        best = max(others, key=lambda name: others[name]["speedup"])
        speedup = others[best]["speedup"]
        text = f"the speed of no speculation, with {best}, the fastest at batch {cell['batch']}"
        tiles.append(tile(times(speedup), text, "good" if speedup > 1 else "bad"))
    greedy = [cell for cell in found["cells"] if cell["temperature"] == 0]
    drafted = [one for c in greedy for name, one in c["arms"].items() if name != NONE]
    if drafted and "shape" not in found:
        same = sum(one["identical"] + one["near_ties"] for one in drafted)
        total = sum(one["requests"] for one in drafted)
        distinct = max(one["distinct_requests"] for one in drafted)
        text = (
            "greedy answers are those of no speculation, near ties included; over arms, batches "
            f"and passes, to {distinct} distinct requests"
        )
        tiles.append(tile(f"{same} of {total}", text, "good" if same == total else "bad"))
    return "".join(tiles)


def _largest(found: Found) -> int:
    return max(cell["batch"] for cell in found["cells"])


def _speed_panel(found: Found, cell: Found) -> str:
    rows = [
        (
            name,
            one["tokens_per_second"],
            f"{one['tokens_per_second']:.1f}"
            + ("" if name == NONE else f" ({times(one['speedup'])})"),
            _colour(found, name),
        )
        for name, one in cell["arms"].items()
    ]
    requests = "request" if cell["batch"] == 1 else "requests"
    title = f"{cell['batch']} {requests} at a time, temperature {cell['temperature']:g}"
    return panel(title, "Tokens per second.", bars(rows, max(row[1] for row in rows)))


def _table(found: Found, temperature: float) -> str:
    head = (
        "Batch, arm", "tokens/s", "speed-up", "lowest to highest pass", "mean of samples",
        "tokens a verification", "accepted", "first token ms, median / p90",
        "further token ms, median / p90", "ended by themselves",
    )  # fmt: skip
    rows = []
    for cell in found["cells"]:
        if cell["temperature"] != temperature:
            continue
        for name, one in cell["arms"].items():
            low, high = min(one["speedup_per_pass"]), max(one["speedup_per_pass"])
            rows.append(
                (
                    f"{cell['batch']}, {name}",
                    number(one["tokens_per_second"], 1),
                    times(one["speedup"]),
                    f"{low:.2f} to {high:.2f}",
                    times(one["speedup_per_sample"]),
                    number(one["acceptance_length"]),
                    _percent(one["acceptance_rate"]),
                    f"{number(one['ttft_median_ms'], 1)} / {number(one['ttft_p90_ms'], 1)}",
                    f"{number(one['tpot_median_ms'], 1)} / {number(one['tpot_p90_ms'], 1)}",
                    f"{one['natural_ends']} of {one['requests']}",
                )
            )
    return (
        f"<h3>Temperature {temperature:g}</h3>{table(head, rows)}"
        '<p class="soft">Tokens a verification count the target\'s own; speed-up is of the whole, '
        "mean of samples is each request's own. Counts of requests are over all passes.</p>"
    )


def _auto(found: Found) -> str:
    """Sizes that follow the load beside the best that is fixed; nothing where one did not run."""
    rows = [
        (
            f"{cell['batch']}, temperature {cell['temperature']:g}",
            times(auto["of_none"]),
            auto["best_fixed"],
            times(auto["of_best_fixed"]),
            "{:.2f} to {:.2f}".format(*_range(auto["of_best_fixed_per_pass"])),
        )
        for cell in found["cells"]
        if (auto := cell.get("auto"))
    ]
    if not rows:
        return ""
    head = ("Batch", "over none", "best fixed size", "over that", "lowest to highest pass")
    return f"<h3>Sizes that follow the load</h3>{table(head, rows)}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.0f} %"


def _ideal(found: Found) -> str:
    if "missing" in found:
        rows = [
            (
                f"{cell['batch']}, {name}",
                number(one["decode_tokens_per_second"], 1),
                times(one["decode_speedup"]),
            )
            for cell in found["cells"]
            if cell["temperature"] == found["cells"][0]["temperature"]
            for name, one in cell["arms"].items()
        ]
        return (
            f"<p>The ideal is not known in this run: {_plain(found['missing'])}. Steps that only "
            "decode, with the whole batch running:</p>"
            + table(("Batch, arm", "decoding tokens/s", "speed-up"), rows)
        )
    head = (
        "Batch, arm", "decoding tokens/s", "speed-up", "ideal speed-up", "share",
        "tokens/s of the products alone", "share",
    )  # fmt: skip
    rows = [
        (
            f"{cell['batch']}, {name}",
            number(one["decode_tokens_per_second"], 1),
            times(one["decode_speedup"]),
            times(one["ideal_speedup"]),
            _percent(one["share_of_ideal_speedup"]),
            number(one["ideal_tokens_per_second"], 1),
            _percent(one["share_of_ideal_tokens_per_second"]),
        )
        for cell in found["cells"]
        if cell["temperature"] == found["cells"][0]["temperature"]
        for name, one in cell["arms"].items()
    ]
    return (
        "<p>Steps that only decode, with the whole batch running. The <b>ideal speed-up</b> is "
        "what the accepted tokens allow if nothing but the target's rows and the draft's levels "
        "took time, at the cost measured for them at start. The <b>products alone</b> are what the "
        "matrix products of the same steps take; no speculation does not reach that either.</p>"
        + table(head, rows)
        + _profile(found["profile"])
    )


def _profile(profile: Found) -> str:
    """Where a step's time goes."""
    if "missing" in profile:
        return f"<p>No profile: {escape(profile['missing'])}</p>"
    parts = dict(profile["milliseconds_per_step"])
    whole = parts.pop("whole step")
    shown = [(name, ms, f"{ms:.2f} ms ({ms / whole:.0%})", "msd") for name, ms in parts.items()]
    note = (
        f"{profile['arm']}, batch 1, {whole:.2f} ms in the mean of {profile['steps']} steps with "
        "drafts, timers included."
    )
    chart = bars(shown, max(parts.values()), left=180)
    return f'<div class="panels">{panel("Where the time of a step goes", note, chart)}</div>'


def _kinds(found: Found) -> str:
    cell = found["cells"][0]
    names = [name for name in found["arms"] if name != NONE]
    kinds = list(cell["arms"][NONE]["by_kind"])

    def values(name: str, what: str) -> Sequence[float | None]:
        return [cell["arms"][name]["by_kind"][kind][what] for kind in kinds]

    panels = []
    for what, title in (
        ("speedup", "Speed-up of a request"),
        ("tokens_per_step", "Tokens of a request in each step"),
    ):
        groups = [(name, _colour(found, name), values(name, what)) for name in names]
        largest = max((v for _, _, found_values in groups for v in found_values if v), default=1.0)
        note = f"Batch {cell['batch']}, temperature {cell['temperature']:g}."
        panels.append(
            panel(title, note, grouped_bars([_name(kind) for kind in kinds], groups, largest))
        )
    return f'<div class="panels">{"".join(panels)}</div>'


def _plain(text: str) -> str:
    """A message of the command line on the page, where names have no marks."""
    return escape(text.replace("`", ""))


def _batch_and_requests(cell: Found) -> str:
    one = cell["arms"][NONE]
    return f"{cell['batch']}, {one['requests']} of {one['distinct_requests']} distinct ones"


def _outputs(found: Found) -> str:
    if "shape" in found:
        return (
            "<p>Not compared: random weights say nothing, and drafts were accepted by draw. Every "
            "answer has the same length.</p>"
        )
    greedy = [cell for cell in found["cells"] if cell["temperature"] == 0]
    if not greedy:
        return "<p>No greedy answers in this run; drawn ones are not compared.</p>"
    names = [name for name in found["arms"] if name != NONE]
    rows = [
        (_batch_and_requests(cell), *(identity(cell["arms"][name]) for name in found["arms"]))
        for cell in greedy
    ]
    support = [
        (name, *(verdict(found["support"][name][str(cell["batch"])]) for cell in greedy))
        for name in names
    ]
    return (
        "<p>Greedy answers against those of no speculation in the first pass, token by token. A "
        "near tie is an answer whose first other token and the target's own are both as good as "
        "its best there, but for a little: rounding decides between them. Drawn answers are not "
        "compared.</p>"
        + table(("Batch, requests in all passes", *found["arms"]), rows)
        + "<p>Works: the same answers, near ties aside, and at least "
        f"{NOT_SLOWER} times as fast as no speculation.</p>"
        + table(("Arm", *(f"batch {cell['batch']}" for cell in greedy)), support)
    )
