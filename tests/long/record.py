"""Results of the tests' long forms: one JSON file, a table of parts, each with its own provenance.

Long forms take minutes to hours and are skipped unless ``MSD_LONG`` is set:

    MSD_LONG=1 python -m pytest tests/long/test_serving.py
"""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_msd.provenance import provenance

FAULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "faults.json"
long_form = pytest.mark.skipif(
    not os.environ.get("MSD_LONG"), reason="a long form; MSD_LONG=1 runs it"
)


def write_part(path: Path, name: str, figures: dict[str, Any], **settings: Any) -> None:
    """Put one part into a result file; the file keeps its other parts.

    Args:
        path: the result file, made if missing.
        name: of the part.
        figures: what was found.
        settings: what it was found with, seeds among them.
    """
    origin = provenance(**settings)
    if Path(sys.argv[0]).parent.name == "pytest":  # python -m pytest
        given = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("MSD_")]
        origin["command"] = " ".join([*given, "python -m pytest", shlex.join(sys.argv[1:])])
    parts = json.loads(path.read_text()) if path.exists() else {}
    parts[name] = {"provenance": origin, **figures}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(parts, indent=1) + "\n")
    os.replace(partial, path)
