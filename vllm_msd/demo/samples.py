"""The held-out samples that come with the pair: requests of its world that training never saw."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_msd.errors import ConfigError
from vllm_msd.measure.inputs import Sample

FOLDER = Path(__file__).parent / "pair" / "samples"
INDEX = "samples.json"
WORLD_KINDS = {
    "vqa": "Visual questions",
    "textvqa": "Reading text",
    "caption": "Captions",
    "chart": "Charts",
    "reasoning": "Reasoning",
    "conversation": "Conversation",
    "text": "Text only",
}
# With those of the real language model's prompts.
KIND_NAMES = {**WORLD_KINDS, "chat": "Chat", "question": "Questions"}


@dataclass
class HeldOutSample(Sample):
    """A request with its right answer.

    answer: to the last question.
    answer_key: what `vllm_msd.demo.scoring.score` needs to judge another answer.
    """

    answer: str
    answer_key: dict[str, Any]


def held_out_samples(count: int | None = None, folder: Path = FOLDER) -> list[HeldOutSample]:
    """The first ``count`` samples, the kinds in turn; all without a count.

    Raises `ConfigError` when there are not so many.
    """
    rows = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if count is not None and count > len(rows):
        raise ConfigError(
            f"samples: got {count} to answer, expected at most the {len(rows)} in {folder}."
        )
    return [_read(row, folder) for row in rows[:count]]


def _read(row: dict[str, Any], folder: Path) -> HeldOutSample:
    images = [Image.open(folder / name).convert("RGB") for name in row["images"]]
    return HeldOutSample(images, row["prompt"], row["kind"], row["answer"], row["answer_key"])
