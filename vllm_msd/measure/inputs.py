"""What is measured: a target with its draft, and the requests it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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


def warm_up_of(samples: Sequence[Sample]) -> Sample:
    """A request as they come, with blank images: vLLM's caches shall hold none that is measured."""
    sample = next((one for one in samples if one.images), samples[0])
    return replace(sample, images=[Image.new("RGB", image.size) for image in sample.images])
