"""Packages fetched by name with pip into a folder of the cache, never into the environment."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vllm_msd.errors import StorageError


def fetch(requirements: Sequence[str], folder: Path, timeout: float | None = None) -> Path:
    """Install packages, without what they depend on, into ``folder``; nothing if it is there.

    The folder appears by one rename, so an interrupted download leaves nothing behind.

    Args:
        requirements: names with versions.
        folder: to install into.
        timeout: how long pip may take (s).

    Raises:
        StorageError: pip is missing, took too long or could not fetch them.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as making:
        new = Path(making) / folder.name
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        command += ["--no-deps", "--target", str(new), *requirements]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=timeout
            )
        except subprocess.TimeoutExpired as error:
            raise StorageError(
                f"{', '.join(requirements)} cannot be fetched within {timeout:.0f} s. Nothing "
                "half-done was left."
            ) from error
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise StorageError(
                f"{', '.join(requirements)} cannot be fetched: {reason.removeprefix('ERROR: ')}. "
                f"Is a package index in reach, and `{sys.executable} -m pip` there? Try again when "
                "they are; nothing half-done was left."
            )
        if not folder.is_dir():  # another process was faster
            shutil.move(new, folder)
    return folder
