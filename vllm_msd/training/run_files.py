"""The folder of a training run: settings, log, checkpoints, left-out records, provenance.

::

    run.json          settings, data and target: what a resumed run must share
    log.jsonl         figures by step        skipped.jsonl   records left out, and why
    curves.png        drawn from the log     tensorboard/    the same, live
    checkpoints/      to resume from         best/, last/    drafts, each with provenance.json
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_msd.errors import ConfigError
from vllm_msd.storage import (
    PARTIAL,
    check_folder,
    remove,
    storage_errors,
    write_json,
    write_text,
)
from vllm_msd.training.data.index import BadRecord, RecordFile
from vllm_msd.training.settings import TrainSettings
from vllm_msd.training.units import Units

_STEP = "step-{:08d}"
_WRITTEN = ("run.json", "log.jsonl", "skipped.jsonl", "curves.png", "best", "last")
_GO_ON = "Mend that, then go on with --resume."
_ANOTHER = "Start a new run in another folder."


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.about = self.folder / "run.json"
        self.log = self.folder / "log.jsonl"
        self.skipped = self.folder / "skipped.jsonl"
        self.checkpoints = self.folder / "checkpoints"

    def check(self, settings: TrainSettings) -> None:
        """Refuse to mix runs, and a place that cannot be written to.

        Raises:
            StorageError: the folder is a file, or not to be written to.
            ConfigError: it holds a run and `resume` is off, or on with other settings, or there is
                nothing to resume.
        """
        check_folder(self.folder, "output")
        if not self.about.is_file():
            if settings.resume:
                raise ConfigError(f"resume: {self.folder} holds no run. Leave --resume out.")
            return
        if not settings.resume:
            raise ConfigError(
                f"output: {self.folder} holds a run already. Give --resume to go on with it, or "
                "another folder."
            )
        found = settings.differences(self._about()["settings"])
        if found:
            raise ConfigError(
                f"resume: the run in {self.folder} was started with other settings:\n  "
                + "\n  ".join(found)
                + "\nTake back what differs, or start a new run in another folder."
            )

    def check_data(self, data: list[dict[str, Any]]) -> None:
        """Refuse to resume with files that have changed since."""
        old = {entry["file"]: entry["sha256"] for entry in self._about()["data"]}
        changed = [new["file"] for new in data if new["sha256"] != old.get(new["file"])]
        if changed:
            raise ConfigError(
                f"resume: {', '.join(changed)} changed since the run was started. Put back what "
                "it was, or start a new run in another folder."
            )

    def units(self) -> Units:
        """What the run's weights are measured in.

        Raises:
            ConfigError: the run was started by another version, or its notes are damaged.
        """
        try:
            return Units(**{name: float(size) for name, size in self._about()["units"].items()})
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"resume: {self.about} names no units to train in. {_ANOTHER}"
            ) from error

    def _about(self) -> dict[str, Any]:
        with storage_errors(self.about, "read", _ANOTHER):
            text = self.about.read_text(encoding="utf-8")
        try:
            run = json.loads(text)
            is_whole = isinstance(run["settings"], dict) and all(
                isinstance(entry["file"] + entry["sha256"], str) for entry in run["data"]
            )
        except (ValueError, TypeError, KeyError):
            is_whole = False
        if not is_whole:
            raise ConfigError(f"resume: {self.about} is damaged. {_ANOTHER}")
        return run

    def start(self, about: dict[str, Any], bad: Iterable[BadRecord]) -> None:
        """Begin a new run."""
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log.unlink(missing_ok=True)
            self.skipped.unlink(missing_ok=True)
        write_json(self.about, about)
        write_text(self.log, "")
        self._list_again(bad)

    def go_on(self, bad: Iterable[BadRecord]) -> None:
        """Take up a run that was killed or has ended."""
        left = [self.folder / (name + PARTIAL) for name in _WRITTEN]
        for name in ("best", "last", "checkpoints"):
            left += (self.folder / name).glob(f"*{PARTIAL}")
        with storage_errors(self.folder):
            for path in left:
                remove(path)
        self._list_again(bad)

    def _list_again(self, bad: Iterable[BadRecord]) -> None:
        """Write the list of left-out records anew: what it holds, and these where it has not."""
        rows = dict.fromkeys((*self._listed(), *bad))
        write_text(self.skipped, "".join(map(_line, rows)))

    def skip(self, bad: Iterable[BadRecord]) -> None:
        """List records that were left out; several processes may do so at once."""
        lines = "".join(map(_line, bad))
        if lines:
            with storage_errors(self.skipped, advice=_GO_ON), self.skipped.open("a") as file:
                file.write(lines)

    def listed(self) -> set[BadRecord]:
        """The records left out so far."""
        return set(self._listed())

    def _listed(self) -> list[BadRecord]:
        names = {"file", "line", "reason"}
        return [BadRecord(**row) for row in _rows(self.skipped) if row.keys() == names]

    def write_log(self, row: dict[str, Any]) -> None:
        """Add a line of figures."""
        with storage_errors(self.log, advice=_GO_ON), self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """All lines of figures."""
        return [row for row in _rows(self.log) if isinstance(row.get("step"), int)]

    def cut_log(self, step: int) -> None:
        """Forget what came after a step, which a resumed run does again."""
        rows = [json.dumps(row) + "\n" for row in self.read_log() if row["step"] <= step]
        write_text(self.log, "".join(rows))

    def complete_checkpoints(self) -> list[Path]:
        """Checkpoints that were written to their end, the newest first."""
        return sorted(self.checkpoints.glob("step-*[0-9]"), reverse=True)

    def checkpoint(self, step: int) -> tuple[Path, Path]:
        """Where a checkpoint is written, and what it is called once it is complete."""
        final = self.checkpoints / _STEP.format(step)
        return final.with_name(final.name + PARTIAL), final

    def keep_checkpoints(self, count: int) -> None:
        """Delete all but the newest."""
        with storage_errors(self.checkpoints):
            for path in self.complete_checkpoints()[count:]:
                remove(path)


def _line(bad: BadRecord) -> str:
    return json.dumps({"file": bad.file, "line": bad.line, "reason": bad.reason}) + "\n"


def _rows(path: Path) -> list[dict[str, Any]]:
    """The tables in a JSONL file; lines that a kill or a full disk cut short are passed over."""
    if not path.is_file():
        return []
    with storage_errors(path, "read"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def describe_data(files: Sequence[RecordFile]) -> list[dict[str, Any]]:
    """Name, digest and size of data files."""
    found = []
    for file in files:
        digest = hashlib.sha256()
        with file.path.open("rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
        found.append(
            {
                "file": file.path.name,
                "sha256": digest.hexdigest(),
                "records": len(file),
                "bad": len(file.bad),
            }
        )
    return found
