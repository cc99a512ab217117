"""Measured costs on disk, under vLLM's cache root, for the next start of the same engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vllm import envs
from vllm.logger import init_logger

from vllm_msd.errors import StorageError

logger = init_logger("vllm.vllm_msd")


class Table(Protocol):
    """Costs that can be written to a file."""

    def save(self, path: Path, key: Mapping[str, Any]) -> None:
        """Write them with what they hold for."""


def table_path(key: Mapping[str, Any]) -> Path:
    """Where the table of a key is kept."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return Path(envs.VLLM_CACHE_ROOT) / "msd_costs" / f"{digest}.json"


def keep(table: Table, key: Mapping[str, Any]) -> None:
    """Write the table of a key; a warning where that does not work."""
    path = table_path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        table.save(path, key)
    except (StorageError, OSError) as error:
        text = "MSD: costs were measured and could not be kept for the next start: %s"
        logger.warning(text, error)
