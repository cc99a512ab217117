"""Files written whole or not at all, and errors of the file system told in a sentence.

A result is written beside its place, flushed to the disk and renamed. So a kill, a full disk or a
power cut leaves the old file or the new one, and at worst a `.partial` that no reader takes for a
result.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_msd.errors import StorageError

PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_USERS_TO_MEND = (*_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR)
# What torch.save says instead of what the system said to it.
_TORCH_WRITER = ("inline_container", "iostream error", "PytorchStreamWriter")


@contextmanager
def storage_errors(path: str | Path, done: str = "written", advice: str = "") -> Iterator[None]:
    """Turn an error of the file system in the block into a `StorageError` of one sentence.

    Args:
        path: what is read or written.
        done: what cannot be done to it ("written", "read").
        advice: what the user can do, where there is more to say than that.
    """
    try:
        yield
    except Exception as error:
        reason = file_error(error)
        if reason is None:
            raise
        is_full = isinstance(error, OSError) and error.errno in _FULL
        usual = "Free some space, or give another place." if is_full else "Give another place."
        raise StorageError(f"{path} cannot be {done}: {reason}. {advice or usual}") from error


def file_error(error: Exception) -> str | None:
    """What the file system said, or None for an error of another kind."""
    if isinstance(error, UnicodeError):
        return f"not UTF-8 ({error.reason})" if isinstance(error, UnicodeDecodeError) else None
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    text = str(error)
    if type(error).__name__ == "SafetensorError" and "I/O error" in text:
        return " ".join(text.split())[:200].rstrip(".")
    if isinstance(error, RuntimeError) and any(word in text for word in _TORCH_WRITER):
        return "PyTorch could not write all of it; is the disk full?"
    return None


def is_users_to_mend(error: OSError) -> bool:
    """Whether an error is a full disk, missing rights or a wrong place, and no fault of ours."""
    return error.errno in _USERS_TO_MEND


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a place to write a file to; it takes the file's place when the block is done.

    The place is in a folder of its own: writers leave files of theirs beside it when they are
    killed (safetensors does).

    Raises:
        StorageError: it cannot be written; the old file is as it was.
    """
    beside = path.with_name(path.name + PARTIAL)
    with storage_errors(path):
        remove(beside)
        try:
            beside.mkdir()
            yield beside / path.name
            _flush(beside / path.name)
            os.replace(beside / path.name, path)
            _flush(path.parent)
        finally:
            remove(beside)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def commit_folder(partial: Path, final: Path) -> None:
    """Give a folder that is complete its name; one that has the name is deleted."""
    with storage_errors(final):
        for path in partial.rglob("*"):
            if path.is_file():
                _flush(path)
        if final.exists():
            remove(final)
        os.replace(partial, final)
        _flush(final.parent)


def remove(path: Path) -> None:
    """Delete a file or folder if it is there; while that goes on, it does not have its name."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.endswith(PARTIAL):
        going = path.with_name(path.name + ".old" + PARTIAL)
        remove(going)
        os.replace(path, going)
        path = going
    shutil.rmtree(path)


def check_folder(path: str | Path, name: str) -> None:
    """Raise `StorageError` unless a folder is there to be written to, or can be made.

    name: what the user calls it.
    """
    folder = Path(path).expanduser()
    with storage_errors(folder):
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise StorageError(f"{name}: {there} is a file, expected a folder. Give another place.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"{name}: {there} is not to be written to. Give another place.")


def check_file(path: str | Path, name: str) -> None:
    """Raise `StorageError` unless a file can be written there; its folder must exist."""
    file = Path(path).expanduser()
    with storage_errors(file):
        is_folder, has_folder = file.is_dir(), file.parent.is_dir()
    if is_folder:
        raise StorageError(f"{name}: {file} is a folder, expected a file. Give another place.")
    if not has_folder:
        raise StorageError(
            f"{name}: the folder {file.parent} does not exist. Make it, or give another place."
        )
    check_folder(file.parent, name)
    if file.exists() and not os.access(file, os.W_OK):
        raise StorageError(f"{name}: {file} is not to be written to. Give another place.")


def _flush(path: Path) -> None:
    """Wait until the disk has a file, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
