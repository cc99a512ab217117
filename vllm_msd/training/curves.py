"""Figures of a run as they come (TensorBoard, or a tracker) and as one picture (`curves.png`)."""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from vllm_msd.errors import ConfigError
from vllm_msd.storage import replacing

PROJECT = "vllm-msd"


class Reporter(Protocol):
    """Where rows of the log go."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_report(name: str) -> None:
    """Refuse a tracker whose package is missing, before anything is loaded.

    Raises:
        ConfigError: it is.
    """
    if name != "none" and find_spec(name) is None:
        raise ConfigError(
            f"report_to: {name} is not installed. Install it (pip install {name}), or choose "
            "another --report-to; log.jsonl and curves.png are written in any case."
        )


class Tracker:
    """Writes rows of the log through one of accelerate's trackers, on the first process."""

    def __init__(self, accelerator: Accelerator, settings: dict[str, Any]) -> None:
        self._accelerator = accelerator
        plain = {k: v if isinstance(v, int | float) else str(v) for k, v in settings.items()}
        accelerator.init_trackers(PROJECT, plain)

    def write(self, row: dict[str, Any]) -> None:
        """Add one row; lists become one curve per drafting step."""
        self._accelerator.log(dict(_flat(row)), step=row["step"])

    def close(self) -> None:
        """Hand in what is left."""
        # Not `end_training`, which also ends what the processes still meet by.
        for tracker in self._accelerator.trackers:
            tracker.finish()


class Board:
    """Writes rows of the log to TensorBoard."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a broken run wrote after its checkpoint is done again.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Add one row; lists become one curve per drafting step."""
        for name, value in _flat(row):
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _flat(row: dict[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in row.items():
        if isinstance(value, dict):
            found += [(f"{name}/{_plain(k)}", v) for k, v in value.items()]
        elif isinstance(value, list):
            found += [(f"{name}/depth{i}", v) for i, v in enumerate(value, 1)]
        elif name != "step":
            found.append((name, value))
    return found


def _plain(kind: str) -> str:
    """A user's name for a kind of work as a part of a curve's name; MLflow refuses other signs."""
    return re.sub(r"[^\w\- :]", "_", kind, flags=re.ASCII) or "_"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw losses, accuracy per depth, the mix of data and acceptance length of all rows."""
    # Without pyplot, which would look for a screen.
    from matplotlib.figure import Figure

    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "acceptance_length" in row]
    figure = Figure(figsize=(11, 7), layout="constrained")
    losses, agreement, mix, acceptance = figure.subplots(2, 2).flatten()
    at = [row["step"] for row in steps]
    losses.plot(at, [row["loss"] for row in steps], label="weighted sum")
    for name in ("regression", "cross_entropy"):
        losses.plot(at, [row[name][0] for row in steps], label=name.replace("_", "-"))
    losses.set_title("losses (first step)")
    depth = len(steps[0]["agreement"]) if steps else 0
    for k in range(depth):
        agreement.plot(at, [row["agreement"][k] for row in steps], label=f"depth {k + 1}")
    agreement.set_title("share of rows whose token is the target's")
    mix.plot(at, [row["multimodal"] for row in steps], label="multimodal")
    mix.plot(at, [1 - row["multimodal"] for row in steps], label="text")
    mix.set_ylim(-0.02, 1.02)
    mix.set_title("share of records")
    kinds = sorted({kind for row in evaluations for kind in row["acceptance_length"]})
    for kind in kinds:
        found = [
            (r["step"], r["acceptance_length"][kind])
            for r in evaluations
            if kind in r["acceptance_length"]
        ]
        label = kind.replace("$", r"\$")  # no formula
        acceptance.plot(*zip(*found, strict=True), marker=".", label=label)
    acceptance.set_title("held-out records: tokens per verification")
    for axes in (losses, agreement, mix, acceptance):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
