"""Pieces of a report page; what they are given as text is escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any


def style() -> str:
    """The style sheet of all report pages."""
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def number(value: float | None, digits: int = 2) -> str:
    """The value to so many digits, "n/a" for none."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def times(value: float | None) -> str:
    """A ratio: "1.25x", "n/a" for none."""
    return "n/a" if value is None else f"{value:.2f}x"


def tile(value: str, label: str, kind: str = "") -> str:
    """A large figure with what it is; ``kind`` may be ``good`` or ``bad``."""
    return f'<div class="tile {kind}"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def panel(title: str, note: str, body: str) -> str:
    """A box around ``body``, which is markup."""
    return (
        f'<div class="panel"><h3>{escape(title)}</h3><p class="soft">{escape(note)}</p>{body}</div>'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways where it is too wide."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{lines}</table></div>'


def facts(provenance: dict[str, Any]) -> str:
    """Rows of a table of what `vllm_msd.provenance.provenance` gives."""
    rows = [("command", provenance["command"]), ("date", provenance["date"])]
    for part in ("settings", "machine", "versions"):
        rows += [(name.replace("_", " "), value) for name, value in provenance[part].items()]
    return "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>"
        for name, value in rows
    )
