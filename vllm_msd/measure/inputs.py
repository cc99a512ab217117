"""What is measured: a target with its draft, and the requests it answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Pair:
    """Folders of a target and the draft trained for it."""

    target: Path
    draft: Path

    def as_dict(self) -> dict[str, str]:
        """Plain strings, for JSON."""
        return {"target": str(self.target), "draft": str(self.draft)}


@dataclass
class Sample:
    """One request.

    images: in the order of the ``{"type": "image"}`` parts of the prompt.
    prompt: chat messages in OpenAI / Hugging Face form, the last one the user's.
    kind: of work; figures are grouped by it.
    """

    images: list[Image.Image]
    prompt: list[dict[str, Any]]
    kind: str
