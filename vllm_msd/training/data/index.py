"""Where the records of a large JSON or JSONL file lie, so that none is held in memory.

One pass over the file notes each record's place and checks its form. Records are then read one by
one, in any order, by any number of processes.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vllm_msd.errors import DataError
from vllm_msd.storage import file_error
from vllm_msd.training.data.records import BadRecordError, Record, parse_record

# Bytes taken at once. JSON's own characters are ASCII, which UTF-8 uses for nothing else, so the
# search for records' ends works on bytes read as Latin-1.
_CHUNK = 1 << 20
_NOT_SPACE = re.compile(r"[^ \t\r\n]")
# What Python's parser says to bytes that are not UTF-8, to bad JSON, and to what is too deep.
_BAD_JSON = (ValueError, RecursionError)
# What one image adds to a record's length estimate, in bytes of text.
_IMAGE_BYTES = 2400


@dataclass(frozen=True)
class BadRecord:
    """A record that was left out, and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


class RecordFile:
    """The usable records of one file, by number from 0.

    Attributes:
        path: the file.
        name: its name without folder and ending, the default kind of its records.
        bad: records left out because of their form.
        num_found: records in the file, good and bad.
        weights: int64 [N], rough length of each record, for putting like beside like.
    """

    def __init__(
        self,
        path: str | Path,
        with_images: bool = True,
        parse: Callable[[Any], Record] = parse_record,
    ) -> None:
        """Index a file.

        Args:
            path: JSON (a list of tables) or JSONL.
            with_images: whether records may have images; otherwise those that do are left out.
            parse: makes a record of what stands in the file, or raises BadRecordError.

        Raises:
            DataError: the file is missing, malformed (the line is named) or without a usable
                record.
        """
        self.path = Path(path).expanduser()
        self.name = self.path.name.removesuffix(".gz").rsplit(".", 1)[0]
        self.parse = parse
        self.bad: list[BadRecord] = []
        self.num_found = 0
        spans: list[tuple[int, int, int]] = []
        weights: list[int] = []
        try:
            for start, end, line, raw in _scan(self.path):
                self.num_found += 1
                try:
                    record = parse(raw)
                    if record.images and not with_images:
                        raise BadRecordError("an image in text-only data")
                except BadRecordError as error:
                    self.bad.append(BadRecord(self.path.name, line, str(error)))
                    continue
                spans.append((start, end, line))
                weights.append(end - start + _IMAGE_BYTES * len(record.images))
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {file_error(error)}. Give a JSON or JSONL file."
            ) from error
        if not spans:
            listed = "".join(f"\n  {bad}" for bad in self.bad[:3])
            raise DataError(f"{path} holds no usable conversation.{listed}")
        self._spans = np.array(spans, dtype=np.int64)
        self.weights = np.array(weights, dtype=np.int64)
        self._file: BinaryIO | None = None
        self._owner = 0

    def __len__(self) -> int:
        return len(self._spans)

    def line(self, number: int) -> int:
        """The line on which a record starts, from 1."""
        return int(self._spans[number, 2])

    def __getitem__(self, number: int) -> Record:
        return self._read(number, self.parse)

    def raw(self, number: int) -> Any:
        """A record as it stands in the file."""
        return self._read(number, lambda raw: raw)

    def _read(self, number: int, parse: Callable[[Any], Any]) -> Any:
        start, end, line = self._spans[number].tolist()
        try:
            # A handle shared with a forked process would share its position too.
            if self._file is None or self._owner != os.getpid():
                self._file, self._owner = self.path.open("rb"), os.getpid()
            self._file.seek(start)
            return parse(json.loads(self._file.read(end - start)))
        except (OSError, *_BAD_JSON, BadRecordError) as error:
            raise DataError(
                f"{self.path}, line {line}: it was a record when the file was first read, and is "
                f"none now ({error}). Leave the file as it is while it is used."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def image_roots(roots: Sequence[str], files: Sequence[RecordFile]) -> list[Path]:
    """Where images are looked for: the given folders, or those of the data.

    Raises:
        DataError: one of the folders is missing.
    """
    found = [Path(root).expanduser() for root in roots] or [f.path.parent for f in files]
    for folder in found:
        if not folder.is_dir():
            raise DataError(f"image_root: {folder} is not a folder. Give one that is there.")
    return list(dict.fromkeys(found))


def _scan(path: Path) -> Iterator[tuple[int, int, int, Any]]:
    """Start, end, line and content of every record, in order."""
    with path.open("rb") as file:
        start = file.read(4096)
        first = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        file.seek(0)
        if not first:
            raise DataError(f"{path} is empty. Give a JSON or JSONL file.")
        _check_encoding(path, start)
        yield from _scan_list(path, file) if first == b"[" else _scan_lines(path, file)


def _check_encoding(path: Path, start: bytes) -> None:
    """Name what a file is that is no text in UTF-8, by its first bytes."""
    if start.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"PAR1")):
        raise DataError(f"{path}: got compressed data, expected JSON or JSONL. Unpack it first.")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start[:4]:
        raise DataError(f"{path}: got text in UTF-16 or UTF-32, expected UTF-8. Save it as UTF-8.")


def _scan_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, int, int, Any]]:
    start = 0
    for line, content in enumerate(file, 1):
        text = content.lstrip(b"\xef\xbb\xbf") if line == 1 else content
        if text.strip():
            try:
                raw = json.loads(text)
            except _BAD_JSON as error:
                raise DataError(
                    f"{path}, line {line}: not valid JSON: {_reason(error)}. A JSONL file holds "
                    "one record per line, a JSON file a list of records."
                ) from error
            yield start + len(content) - len(text), start + len(content), line, raw
        start += len(content)


def _scan_list(path: Path, file: BinaryIO) -> Iterator[tuple[int, int, int, Any]]:
    """A JSON list, one element at a time."""
    decoder = json.JSONDecoder()
    buffer = file.read(_CHUNK).decode("latin-1")
    skip = 3 if buffer.startswith("\xef\xbb\xbf") else 0
    position = _after_space(buffer, skip) + 1  # past the bracket
    base, line = 0, 1 + buffer.count("\n", 0, position)
    is_first = True

    def more() -> bool:
        """Drop what is done and read on; False at the end of the file."""
        nonlocal buffer, base, position
        # Growing with what is left keeps one huge record from being read in many small steps.
        chunk = file.read(max(_CHUNK, len(buffer) - position))
        base, buffer, position = base + position, buffer[position:] + chunk.decode("latin-1"), 0
        return bool(chunk)

    def skip_space() -> str:
        """Move to the next character that is not space; empty at the end."""
        nonlocal position, line
        while True:
            end = _after_space(buffer, position)
            line += buffer.count("\n", position, end)
            position = end
            if position < len(buffer) or not more():
                return buffer[position : position + 1]

    def fail(reason: str) -> DataError:
        return DataError(f"{path}, line {line}: not valid JSON: {reason}")

    while True:
        character = skip_space()
        if character == "]":
            position += 1
            if skip_space():
                raise fail("text after the end of the list")
            return
        if not is_first:
            if character != ",":
                wanted = "the list is cut short" if not character else "expected ',' or ']'"
                raise fail(wanted)
            position += 1
            skip_space()
        is_first = False
        while True:
            try:
                raw, end = decoder.raw_decode(buffer, position)
            except _BAD_JSON as error:
                place = getattr(error, "pos", position)
                is_open = "Unterminated string" in str(error) or place > len(buffer) - 16
                done = place - position  # more() moves the buffer, not the distance
                if is_open and more():
                    continue
                line += buffer.count("\n", position, position + done)
                cut = "the file is cut short" if is_open else _reason(error)
                raise fail(cut) from error
            if end < len(buffer):
                break
            # What ends with the chunk may be a number that goes on in the next.
            if not more():
                raise fail("the file is cut short")
        text = buffer[position:end]
        if not text.isascii():  # so far its bytes were read as Latin-1
            try:
                raw = json.loads(text.encode("latin-1"))
            except _BAD_JSON as error:
                raise fail(_reason(error)) from error
        yield base + position, base + end, line, raw
        line += buffer.count("\n", position, end)
        position = end


def _after_space(text: str, position: int) -> int:
    """Where the next character that is not space stands; the end where there is none."""
    found = _NOT_SPACE.search(text, position)
    return found.start() if found else len(text)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "tables within tables, too many of them"
    return str(getattr(error, "msg", error))
