"""`provenance.json` beside trained weights: what made them, from which world."""

import hashlib
import json
from pathlib import Path
from typing import Any

from vllm_msd.provenance import provenance


def world_digest() -> str:
    """SHA-256 over the world's sources: equal digests mean equal training data."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "world").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_record(
    folder: Path, what: str, settings: dict[str, Any], outcome: dict[str, Any]
) -> None:
    """Write `provenance.json` into a checkpoint folder."""
    content = {
        "what": what,
        **provenance(**settings),
        "outcome": outcome,
        "world_sha256": world_digest(),
    }
    (folder / "provenance.json").write_text(json.dumps(content, indent=2) + "\n")
