"""The demo's HTML report: one file, images inside, nothing fetched."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from vllm_msd.demo.compare import Comparison
from vllm_msd.demo.world import score

TEMPLATE = Path(__file__).with_name("report_template.html")

KIND_NAMES = {
    "vqa": "Visual questions",
    "textvqa": "Reading text",
    "caption": "Captions",
    "chart": "Charts",
    "reasoning": "Reasoning",
    "conversation": "Conversation",
    "text": "Text only",
}


def render(
    small: Sequence[Comparison],
    small_figures: dict[str, Any],
    wide_figures: dict[str, Any] | None,
    provenance: dict[str, Any],
) -> str:
    """The whole page. ``*_figures`` are `vllm_msd.demo.compare.figures` of the two pairs.

    ``wide_figures`` is None when only the small pair was run. Everything that is not markup of this
    module is escaped.
    """
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        lead=_lead(small_figures, provenance),
        tiles=_tiles(small_figures, wide_figures, provenance),
        meaning=_meaning(wide_figures, provenance),
        panels=_panels(small_figures, wide_figures, provenance),
        wide_table=_wide_table(wide_figures, provenance),
        cards="".join(_card(c) for c in small),
        facts=_facts(provenance),
    )


def _lead(figures: dict, provenance: dict) -> str:
    count = provenance["settings"]["num_speculative_tokens"]
    return (
        f"{figures['requests']} held-out requests, answered by the same target with and without an "
        f"MSD draft of {count} tokens. {escape(provenance['date'])}."
    )


def _tile(value: str, label: str, kind: str = "") -> str:
    return f'<div class="tile {kind}"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def _tiles(small: dict, wide: dict | None, provenance: dict) -> str:
    same = small["identical"] == small["requests"]
    tiles = [
        _tile(
            f"{small['identical']} of {small['requests']}",
            "answers identical with and without MSD (fp32, greedy)",
            "good" if same else "bad",
        ),
        _tile(
            _number(small["multimodal"]["acceptance_length"]),
            "tokens per verification on image requests, the target's own included",
        ),
    ]
    if wide is not None:
        size, times = provenance["settings"]["wide"], wide["speed"]["speedup"]
        label = f"the decoding speed without MSD, at {size} parameters in bf16"
        tiles.append(_tile(_times(times), label, "good" if times and times > 1 else "bad"))
    return "".join(tiles)


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
    size = escape(str(provenance["settings"]["wide"]))
    return text + (
        "<p><b>Cost comes from the large shape.</b> The small model is all overhead, so its speed "
        "says little. Speed is shown on the same two functions widened to about "
        f"{size} parameters: wider layers, more heads, and added layers that add zero. Every token "
        "costs what it costs in a model of that size, and acceptance stays the small pair's. In "
        "bf16 two nearly equal logits can come out in either order when several tokens are checked "
        f"at once, so answers may differ there: {wide['identical']} of {wide['requests']} were "
        "identical.</p>"
    )


def _panels(small: dict, wide: dict | None, provenance: dict) -> str:
    rows = [
        (KIND_NAMES[kind], a["acceptance_length"], _number(a["acceptance_length"]), "msd")
        for kind, a in small["by_kind"].items()
    ]
    limit = provenance["settings"]["num_speculative_tokens"] + 1
    panels = [
        _panel(
            "Tokens per verification",
            f"Small pair, fp32. 1 means nothing accepted; {limit} is the most possible.",
            _bars(rows, limit),
        )
    ]
    pairs = [("Small pair, fp32", small)]
    if wide is not None:
        pairs.insert(0, (f"Widened to {provenance['settings']['wide']}, bf16", wide))
    charts = []
    for name, figures in pairs:
        plain = figures["speed"]["plain_tokens_per_second"]
        msd = figures["speed"]["msd_tokens_per_second"]
        rows = [
            ("without MSD", plain, _number(plain, 1), "plain"),
            ("with MSD", msd, f"{_number(msd, 1)}  ({_times(figures['speed']['speedup'])})", "msd"),
        ]
        charts.append(f"<p><b>{escape(name)}</b></p>" + _bars(rows, max(plain or 0, msd or 0)))
    panels.append(
        _panel(
            "Decoding speed, tokens per second",
            "Batch 1, greedy; both engines took turns on the same cores.",
            "".join(charts),
        )
    )
    return "".join(panels)


def _panel(title: str, note: str, body: str) -> str:
    return (
        f'<div class="panel"><h3>{escape(title)}</h3><p class="soft">{escape(note)}</p>{body}</div>'
    )


def _bars(rows: Iterable[tuple[str, float | None, str, str]], maximum: float) -> str:
    """Horizontal bars as SVG; a row is label, value, the text after the bar, and its colour."""
    rows = list(rows)
    height, left, width, room = 32, 138, 480, 96
    parts = []
    for index, (label, value, text, colour) in enumerate(rows):
        top = index * height
        length = (width - left - room) * (value or 0) / maximum if maximum else 0
        parts.append(
            f'<text x="0" y="{top + 20}">{escape(label)}</text>'
            f'<rect x="{left}" y="{top + 5}" width="{length:.1f}" height="22" rx="3" '
            f'fill="var(--{colour})"/>'
            f'<text x="{left + length + 8:.1f}" y="{top + 20}">{escape(text)}</text>'
        )
    described = escape("; ".join(f"{label}: {text}" for label, _, text, _ in rows))
    return (
        f'<svg viewBox="0 0 {width} {len(rows) * height}" role="img" aria-label="{described}">'
        f"{''.join(parts)}</svg>"
    )


def _wide_table(wide: dict | None, provenance: dict) -> str:
    if wide is None:
        return ""
    rows = [
        (KIND_NAMES[kind], figures, wide["by_kind"][kind])
        for kind, figures in wide["speed_by_kind"].items()
    ]
    rows.append(("All", wide["speed"], wide["all"]))
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td>{_number(speed['plain_tokens_per_second'], 1)}</td>"
        f"<td>{_number(speed['msd_tokens_per_second'], 1)}</td><td>{_times(speed['speedup'])}</td>"
        f"<td>{_number(accepted['acceptance_length'])}</td></tr>"
        for name, speed, accepted in rows
    )
    rounds = ", ".join(_times(r) for r in wide["speed"]["speedup_per_round"])
    size = escape(str(provenance["settings"]["wide"]))
    return (
        f'<h2>Widened pair ({size}, bf16) by kind</h2><div class="scroll"><table><tr><th>Kind</th>'
        "<th>tokens/s without</th><th>tokens/s with MSD</th><th>speed-up</th>"
        f"<th>tokens per verification</th></tr>{cells}</table></div>"
        f'<p class="soft">Speed-up in each interleaved round: {escape(rounds)}.</p>'
    )


def _card(comparison: Comparison) -> str:
    sample, msd = comparison.sample, comparison.msd
    images = "".join(
        f'<img src="{_data_uri(image)}" alt="image of this request">' for image in sample.images
    )
    turns = []
    for index, message in enumerate(sample.prompt):
        last = index == len(sample.prompt) - 1
        text = "".join(p["text"] for p in message["content"] if p["type"] == "text").strip()
        who = "user" if message["role"] == "user" else "assistant"
        turns.append(
            f'<p class="turn {who}{"" if last else " earlier"}">{escape(text)}</p>',
        )
    length = 1 + msd.num_accepted_tokens / msd.num_drafts if msd.num_drafts else None
    right = score(sample, msd.text)
    tags = [KIND_NAMES[sample.kind], f"{_number(length)} tokens per verification"]
    tags.append("right" if right >= 1 else "wrong" if right <= 0 else f"score {right:.2f}")
    same = (
        '<span class="tag">same text without MSD</span>'
        if comparison.identical
        else '<span class="tag differs">differs without MSD</span>'
    )
    other = ""
    if not comparison.identical:
        other = (
            '<p class="soft">Without MSD:</p>'
            f'<p class="answer">{escape(comparison.plain.text.strip())}</p>'
        )
    return (
        f'<div class="card"><div>{images or "<div class=none>no image</div>"}</div><div>'
        f'<div class="tags">{"".join(f"<span class=tag>{escape(t)}</span>" for t in tags)}{same}'
        f'</div>{"".join(turns)}<p class="answer">{_marked(comparison)}</p>{other}</div></div>'
    )


def _marked(comparison: Comparison) -> str:
    """The answer with runs of accepted tokens in ``<mark>``."""
    runs: list[tuple[bool, str]] = []
    for piece, accepted in zip(comparison.msd.pieces, comparison.msd.accepted, strict=True):
        if runs and runs[-1][0] == accepted:
            runs[-1] = (accepted, runs[-1][1] + piece)
        else:
            runs.append((accepted, piece))
    if runs:
        runs[0] = (runs[0][0], runs[0][1].lstrip())
    return "".join(
        f"<mark>{escape(text)}</mark>" if accepted and text else escape(text)
        for accepted, text in runs
    )


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _facts(provenance: dict[str, Any]) -> str:
    rows = [("command", provenance["command"]), ("date", provenance["date"])]
    for table in ("settings", "machine", "versions"):
        rows += [(name.replace("_", " "), value) for name, value in provenance[table].items()]
    return "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>"
        for name, value in rows
    )


def _number(value: float | None, digits: int = 2) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _times(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}x"
