"""The page as a whole, and its figures."""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from vllm_msd.demo.report.answers import card, draft_tree
from vllm_msd.demo.report.real import real_section
from vllm_msd.demo.samples import KIND_NAMES
from vllm_msd.measure.compare import Comparison
from vllm_msd.measure.engine import SHORT, Drafting
from vllm_msd.measure.report.bars import bars, grouped_bars
from vllm_msd.measure.report.parts import facts, number, panel, style, tile, times

TEMPLATE = Path(__file__).with_name("template.html")


def render(
    comparisons: Sequence[Comparison],
    small: dict[str, dict[str, Any]],
    wide: dict[str, dict[str, Any]] | None,
    draftings: dict[str, Drafting],
    provenance: dict[str, Any],
    text_of: Callable[[int], str],
    real: Any = None,
) -> str:
    """The whole page; everything in it that is not markup of this module is escaped.

    Args:
        comparisons: the small pair's answers.
        small: `vllm_msd.measure.compare.figures` of each drafting with the small pair.
        wide: with the widened pair, None when only the small pair was run.
        draftings: what was drafted, by the same names.
        provenance: of the run.
        text_of: a token's text, for the tree.
        real: of the real language model, see `real_section`.
    """
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        style=style(),
        lead=_lead(comparisons, draftings, provenance),
        tiles=_tiles(comparisons, small, wide, draftings, provenance),
        meaning=_meaning(wide, provenance),
        panels=_panels(small, wide, draftings, provenance),
        wide_table=_wide_table(wide, draftings, provenance),
        tree=draft_tree(comparisons, text_of),
        real=real_section(real),
        cards="".join(card(c) for c in comparisons),
        facts=facts(provenance),
    )


def _colours(names: Iterable[str]) -> dict[str, str]:
    """The colour of each drafting: the tree's, or the only one's, is the strong one."""
    names = list(names)
    return {name: "msd" if name == names[-1] else "msd-pale" for name in names}


def _lead(comparisons: Sequence, draftings: dict[str, Drafting], provenance: dict) -> str:
    drafted = " and with a ".join(str(drafting) for drafting in draftings.values())
    return (
        f"{len(comparisons)} held-out requests, answered by the same target without a draft and "
        f"with an MSD draft: with a {escape(drafted)}. {escape(provenance['date'])}."
    )


def _tiles(
    comparisons: Sequence[Comparison],
    small: dict,
    wide: dict | None,
    draftings: dict[str, Drafting],
    provenance: dict,
) -> str:
    same = sum(all(c.identical(name) for name in draftings) for c in comparisons)
    tiles = [
        tile(
            f"{same} of {len(comparisons)}",
            "answers identical with and without MSD (fp32, greedy)",
            "good" if same == len(comparisons) else "bad",
        )
    ]
    for name, drafting in draftings.items():
        tiles.append(
            tile(
                number(small[name]["multimodal"]["acceptance_length"]),
                "tokens per verification on image requests, the target's own included, with a "
                f"{drafting}",
            )
        )
    for name, drafting in draftings.items() if wide is not None else ():
        size, speedup = _wide_name(provenance), wide[name]["speed"]["speedup"]
        label = f"the decoding speed without MSD, at {size}, with a {drafting}"
        is_faster = speedup is not None and speedup > 1
        tiles.append(tile(times(speedup), label, "good" if is_faster else "bad"))
    return "".join(tiles)


def _wide_name(provenance: dict) -> str:
    settings = provenance["settings"]
    return f"{settings['wide']} parameters in {SHORT[settings['wide_dtype']]}"


def _meaning(wide: dict | None, provenance: dict) -> str:
    text = (
        "<p><b>Acceptance comes from the small pair.</b> The target is a LLaVA of a few million "
        "parameters, trained from scratch on a procedural world of scenes, signs and charts; its "
        "draft was trained on the target's outputs. Both come with the package. How many drafted "
        "tokens the target accepts is a property of this pair and this world, not of larger models."
        "</p>"
    )
    if wide is None:
        return text + (
            "<p>A model this small is all overhead, so its speed says little. The widened pair, "
            "which has a real model's cost, was skipped in this run.</p>"
        )
    size = escape(_wide_name(provenance))
    identical = " and ".join(
        f"{found['identical']} of {found['requests']} were identical with the {escape(name)}"
        for name, found in wide.items()
    )
    return text + (
        "<p><b>Cost comes from the large shape.</b> The small model is all overhead, so its speed "
        "says little. Speed is shown on the same two functions widened to about "
        f"{size}: wider layers, more heads, and added layers that add zero. Every token "
        "costs what it costs in a model of that size, and acceptance stays the small pair's. In "
        "bf16 two nearly equal logits can come out in either order when several tokens are checked "
        f"at once, so answers may differ there: {identical}.</p>"
    )


def _panels(
    small: dict, wide: dict | None, draftings: dict[str, Drafting], provenance: dict
) -> str:
    colours = _colours(draftings)
    kinds = list(next(iter(small.values()))["by_kind"])
    most = max(drafting.deepest for drafting in draftings.values())
    panels = [
        panel(
            "Tokens per verification",
            "Small pair, fp32. 1 means nothing accepted; one more than its depth is the most a "
            "chain or tree can give.",
            grouped_bars(
                [KIND_NAMES[kind] for kind in kinds],
                [
                    (
                        str(draftings[name]),
                        colours[name],
                        [found["by_kind"][kind]["acceptance_length"] for kind in kinds],
                    )
                    for name, found in small.items()
                ],
                most + 1,
            ),
        ),
        panel(
            "Accepted by depth",
            "Share of the verifications that accepted a drafted token at this depth. Small pair, "
            "all requests.",
            grouped_bars(
                [f"Depth {depth + 1}" for depth in range(most)],
                [
                    (
                        str(draftings[name]),
                        colours[name],
                        _by_depth(found["all"], draftings[name].deepest, most),
                    )
                    for name, found in small.items()
                ],
                1,
            ),
        ),
    ]
    pairs = [("Small pair, fp32", small)]
    if wide is not None:
        pairs.insert(0, (f"Widened to {_wide_name(provenance)}", wide))
    charts = []
    for title, found in pairs:
        speeds = {name: one["speed"] for name, one in found.items()}
        plain = next(iter(speeds.values()))["plain_tokens_per_second"]
        rows = [("without MSD", plain, number(plain, 1), "plain")]
        for name, one in speeds.items():
            rate = one["msd_tokens_per_second"]
            text = f"{number(rate, 1)}  ({times(one['speedup'])})"
            rows.append((f"with a {name}", rate, text, colours[name]))
        longest = max(value or 0 for _, value, _, _ in rows)
        charts.append(f"<p><b>{escape(title)}</b></p>" + bars(rows, longest))
    panels.append(
        panel(
            "Decoding speed, tokens per second",
            "Batch 1, greedy; the engines took turns on the same cores.",
            "".join(charts),
        )
    )
    return "".join(panels)


def _by_depth(accepted: dict[str, Any], deepest: int, rows: int) -> list[float | None]:
    shares = accepted["acceptance_rate_per_position"] or [0.0] * deepest
    return [shares[depth] if depth < deepest else None for depth in range(rows)]


def _wide_table(wide: dict | None, draftings: dict[str, Drafting], provenance: dict) -> str:
    if wide is None:
        return ""
    first = next(iter(wide.values()))
    kinds = list(first["speed_by_kind"])
    head = "<th>Kind</th><th>tokens/s without</th>" + "".join(
        f"<th>{escape(name)}: tokens/s</th><th>speed-up</th><th>tokens per verification</th>"
        for name in wide
    )
    lines = []
    for kind in [*kinds, None]:
        cells = [KIND_NAMES[kind] if kind else "All"]
        for name, found in wide.items():
            speed = found["speed_by_kind"][kind] if kind else found["speed"]
            accepted = found["by_kind"][kind] if kind else found["all"]
            if name == next(iter(wide)):
                cells.append(number(speed["plain_tokens_per_second"], 1))
            cells += [
                number(speed["msd_tokens_per_second"], 1),
                times(speed["speedup"]),
                number(accepted["acceptance_length"]),
            ]
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    rounds = "; ".join(
        f"{draftings[name]}: " + ", ".join(times(r) for r in found["speed"]["speedup_per_round"])
        for name, found in wide.items()
    )
    size = escape(_wide_name(provenance))
    return (
        f'<h2>Widened pair ({size}) by kind</h2><div class="scroll"><table><tr>{head}</tr>'
        f"{''.join(lines)}</table></div>"
        f'<p class="soft">Speed-up in each interleaved round: {escape(rounds)}.</p>'
    )
