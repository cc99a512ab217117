"""The folder of a training run: settings, log, checkpoints, left-out records, provenance.

::

    run.json          settings, data and target: what a resumed run must share
    log.jsonl         figures by step        skipped.jsonl   records left out, and why
    curves.png        drawn from the log     tensorboard/    the same, live
    checkpoints/      to resume from         best/, last/    drafts, each with provenance.json
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_msd.errors import ConfigError
from vllm_msd.training.data.index import BadRecord, RecordFile
from vllm_msd.training.settings import TrainSettings

_STEP = "step-{:08d}"


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.about = self.folder / "run.json"
        self.log = self.folder / "log.jsonl"
        self.skipped = self.folder / "skipped.jsonl"
        self.checkpoints = self.folder / "checkpoints"

    def check(self, settings: TrainSettings) -> None:
        """Refuse to mix runs.

        Raises:
            ConfigError: the folder holds a run and `resume` is off, or on with other settings, or
                there is nothing to resume.
        """
        if not self.about.is_file():
            if settings.resume:
                raise ConfigError(f"resume: {self.folder} holds no run. Leave --resume out.")
            return
        if not settings.resume:
            raise ConfigError(
                f"output: {self.folder} holds a run already. Give --resume to go on with it, or "
                "another folder."
            )
        run = json.loads(self.about.read_text())
        found = settings.differences(run["settings"])
        if found:
            raise ConfigError(
                f"resume: the run in {self.folder} was started with other settings:\n  "
                + "\n  ".join(found)
                + "\nTake back what differs, or start a new run in another folder."
            )

    def check_data(self, data: list[dict[str, Any]]) -> None:
        """Refuse to resume with files that have changed since."""
        run = json.loads(self.about.read_text())
        changed = [
            new["file"]
            for new, old in zip(data, run["data"], strict=True)
            if new["sha256"] != old["sha256"]
        ]
        if changed:
            raise ConfigError(
                f"resume: {', '.join(changed)} changed since the run was started. Put back what "
                "it was, or start a new run in another folder."
            )

    def start(self, about: dict[str, Any], bad: Iterable[BadRecord]) -> None:
        """Begin a new run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.about, about)
        self.log.write_text("")
        self.skipped.write_text("")
        self.skip(bad)

    def skip(self, bad: Iterable[BadRecord]) -> None:
        """List records that were left out; several processes may do so at once."""
        lines = "".join(
            json.dumps({"file": b.file, "line": b.line, "reason": b.reason}) + "\n" for b in bad
        )
        if lines:
            with self.skipped.open("a", encoding="utf-8") as file:
                file.write(lines)

    def listed(self) -> set[BadRecord]:
        """The records left out so far."""
        with self.skipped.open(encoding="utf-8") as file:
            return {BadRecord(**json.loads(line)) for line in file}

    def write_log(self, row: dict[str, Any]) -> None:
        """Add a line of figures."""
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """All lines of figures."""
        if not self.log.is_file():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def cut_log(self, step: int) -> None:
        """Forget what came after a step, which a resumed run does again."""
        rows = [json.dumps(row) + "\n" for row in self.read_log() if row["step"] <= step]
        partial = self.log.with_suffix(".partial")
        partial.write_text("".join(rows))
        os.replace(partial, self.log)

    def newest_checkpoint(self) -> Path | None:
        """The last complete checkpoint."""
        return max(self.checkpoints.glob("step-*[0-9]"), default=None)

    def checkpoint(self, step: int) -> tuple[Path, Path]:
        """Where a checkpoint is written, and what it is called once it is complete."""
        final = self.checkpoints / _STEP.format(step)
        return final.with_name(final.name + ".partial"), final

    def keep_checkpoints(self, count: int) -> None:
        """Delete all but the newest, and what broken runs left behind."""
        for path in sorted(self.checkpoints.glob("step-*[0-9]"))[:-count]:
            shutil.rmtree(path)
        for path in self.checkpoints.glob("*.partial"):
            shutil.rmtree(path)


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


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
