"""Bar charts of the report, as inline SVG."""

from collections.abc import Iterable, Sequence
from html import escape


def bars(
    rows: Iterable[tuple[str, float | None, str, str]], maximum: float, left: int = 138
) -> str:
    """Horizontal bars; a row is label, value, the text after the bar, and its colour.

    ``left`` is the room for labels, in px of a picture 480 wide.
    """
    rows = list(rows)
    height, width, room = 32, 480, 122
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


def grouped_bars(
    labels: Sequence[str],
    groups: Sequence[tuple[str, str, Sequence[float | None]]],
    maximum: float,
    digits: int = 2,
) -> str:
    """Thin bars in groups, one group a label, with a legend below when there are several series.

    A series is its name, its colour and a value per label; None leaves its bar out.
    """
    thickness, left, width, room = 15, 138, 480, 60
    step = thickness * len(groups) + 12
    parts, described = [], []
    for row, label in enumerate(labels):
        top = row * step
        middle = top + 4 + thickness * len(groups) / 2
        parts.append(f'<text x="0" y="{middle + 4.5:.1f}">{escape(label)}</text>')
        for index, (name, colour, values) in enumerate(groups):
            value = values[row]
            if value is None:
                continue
            y = top + 4 + index * thickness
            length = (width - left - room) * value / maximum if maximum else 0
            parts.append(
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{thickness - 2}" rx="2" '
                f'fill="var(--{colour})"><title>{escape(name)}</title></rect>'
                f'<text class="small" x="{left + length + 6:.1f}" y="{y + 10.5:.1f}">'
                f"{value:.{digits}f}</text>"
            )
            described.append(f"{label}, {name}: {value:.{digits}f}")
    height = len(labels) * step
    if len(groups) > 1:
        for index, (name, colour, _) in enumerate(groups):
            y = height + 6 + index * 20
            parts.append(
                f'<rect x="{left}" y="{y}" width="12" height="12" rx="2" fill="var(--{colour})"/>'
                f'<text class="small" x="{left + 20}" y="{y + 10.5:.1f}">{escape(name)}</text>'
            )
        height += 6 + 20 * len(groups)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape("; ".join(described))}">{"".join(parts)}</svg>'
    )
