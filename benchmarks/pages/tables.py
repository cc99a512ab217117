"""Tables and the line under them that says where figures come from."""

from collections.abc import Iterable
from typing import Any


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; numbers are shown with two decimals, None as a dash."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(shown(cell) for cell in line) + " |" for line in lines)


def shown(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def source(name: str, facts: dict[str, Any]) -> str:
    """When, where and with which versions a result file was made."""
    versions = ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
    return f"`{name}`, {facts['date']}; {machine(facts)}; {versions}."


def machine(facts: dict[str, Any]) -> str:
    """The machine that a result comes from."""
    units = {"cores": "cores", "memory_gib": "GiB"}
    return ", ".join(f"{v} {units.get(k, '')}".strip() for k, v in facts["machine"].items())


def source_of_parts(name: str, result: dict[str, Any]) -> str:
    """Of a file whose parts were run at different times: when and where the newest was."""
    newest = max((report["provenance"] for report in result.values()), key=lambda p: p["date"])
    return f"{source(name, newest)} This is its newest part; in the file each names its own."
