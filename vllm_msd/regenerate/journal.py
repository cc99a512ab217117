"""What is done so far, a line per conversation, so that a kill loses nothing and doubles nothing.

The first line says what the conversations were made from and how; a run of another kind is refused.
A line that was cut short is passed over, and its conversation asked for again. Only places of lines
are kept in memory.
"""

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_msd.errors import ConfigError
from vllm_msd.storage import storage_errors, write_text

_GO_ON = "Mend that, then start the same command again: it goes on from here."


class Journal:
    """The finished conversations of a run, by record number and sample.

    Attributes:
        path: ``<output>.journal``, beside the output.
        resumed: conversations that were there already.
    """

    def __init__(self, output: Path, about: dict[str, Any], force: bool = False) -> None:
        """Open a run's journal, or begin it.

        Args:
            output: the file that is written at the end.
            about: data and settings, in JSON's types, which a resumed run must share.
            force: forget what a run with other settings has done.

        Raises:
            ConfigError: it belongs to a run with other settings, or another process is at it.
            StorageError: it cannot be read or written.
        """
        self.path = output.with_name(output.name + ".journal")
        self._places: dict[tuple[int, int], tuple[int, int]] = {}
        with storage_errors(self.path):
            if not self.path.exists():
                write_text(self.path, _line(about))
            self._file = self.path.open("r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigError(
                f"--output: another process is at work on {output}. Wait for it, or give another "
                "place."
            ) from error
        try:
            with storage_errors(self.path, "read"):
                self._read(about, force)
        except BaseException:
            self._file.close()
            raise
        self.resumed = len(self)

    def _read(self, about: dict[str, Any], force: bool) -> None:
        first = _table(self._file.readline()) or {}
        place = self._file.tell()
        for line in self._file:
            row = _table(line) if line.endswith(b"\n") else None
            if row is not None and {"record", "sample"} <= row.keys():
                self._places.setdefault((row["record"], row["sample"]), (place, len(line)))
            place += len(line)
            if not line.endswith(b"\n"):  # what follows must not be joined to it
                self._file.write(b"\n")
                place += 1
        differences = _differences(first, about)
        if differences and self._places and not force:
            raise ConfigError(
                f"{self.path} was begun with other settings:\n  "
                + "\n  ".join(differences)
                + "\nTake back what differs, give another --output, or forget it with --force."
            )
        if differences:  # a run that has done nothing is no loss
            self._begin(about)

    def _begin(self, about: dict[str, Any]) -> None:
        self._places.clear()
        self._file.truncate(0)
        self._file.seek(0)
        self._file.write(_line(about).encode())
        self._file.flush()

    def forget(self, about: dict[str, Any]) -> None:
        """Begin anew, whatever was done; ``about`` as at the start.

        Raises:
            StorageError: it cannot be written.
        """
        with storage_errors(self.path):
            self._begin(about)
        self.resumed = 0

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        place, length = self._places[key]
        with storage_errors(self.path, "read"):
            self._file.seek(place)
            return json.loads(self._file.read(length))

    def add(self, record: int, sample: int, **found: Any) -> None:
        """Note a finished conversation; it is in the file when this returns."""
        line = _line({"record": record, "sample": sample, **found}).encode()
        with storage_errors(self.path, advice=_GO_ON):
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(line)
            self._file.flush()
        self._places[record, sample] = (place, len(line))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _table(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name)!r}, now {new.get(name)!r}" for name in names]
