"""Slot reading: an auxiliary task that teaches the vision tower before words do.

From scratch, a captioning loss alone finds the picture late: wording is learned first and the
image looks like noise. A small reader that must name what fills each slot of the picture (shape
in a cell, word on a row, height of a bar) gives the tower a direct signal. It is thrown away
after training.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from .data import Labels
from .tokenizer import PATCH_SIZE
from .world.base import IMAGE_SIZE
from .world.charts import INKS, LABELS, LEFT, STEPS, TOPICS
from .world.scene import COLOURS, GROUNDS, SHAPES, SIZES
from .world.signs import LETTER_COLUMNS, LETTERS, NUMBERS, PLATES, WORDS

# The one thing in a picture of `easy-vqa` (see `real.pictures`), in the data set's words.
FIGURES = ("circle", "rectangle", "triangle")
PAINTS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

# Number of classes by the last part of a slot name; 0 means empty where a slot can be.
PARTS = {
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "size": 1 + len(SIZES),
    "ground": len(GROUNDS),
    "plate": 1 + len(PLATES),
    "text": 1 + len(WORDS) + len(NUMBERS),
    "letter": 1 + len(LETTERS),
    "value": 1 + len(STEPS),
    "form": 2,
    "topic": len(TOPICS),
    "ink": len(INKS),
    "labels": len(LABELS),
    "figure": len(FIGURES),
    "paint": len(PAINTS),
}
# Parts whose class 0 is a value like any other; elsewhere accuracy leaves empty slots out.
NEVER_EMPTY = ("ground", "form", "topic", "ink", "labels", "figure", "paint")
SLOTS = (
    *(f"cell{c}.{part}" for c in range(9) for part in ("shape", "colour", "size")),
    "ground",
    *(f"row{r}.{part}" for r in range(3) for part in ("plate", "text")),
    *(f"row{r}.letter{c}" for r in range(3) for c in range(LETTER_COLUMNS)),
    *(f"value{i}" for i in range(5)),
    "form",
    "topic",
    "ink",
    "labels",
    "figure",
    "paint",
)


# Reading units by part: the hidden width of its two-layer reader.
READER_WIDTH = 256
SIDE = IMAGE_SIZE // PATCH_SIZE


def part_of(slot: str) -> str:
    """The class set of a slot: `cell3.shape` -> `shape`, `value2` -> `value`."""
    return slot.split(".")[-1].rstrip("0123456789")


def _block(rows: range, columns: range) -> list[int]:
    return [SIDE * row + column for row in rows for column in columns]


def window_of(slot: str) -> list[int]:
    """The patches that show a slot; every slot of a part has equally many."""
    part = part_of(slot)
    if slot.startswith("cell"):
        row, column = divmod(int(slot[4]), 3)
        return _block(range(2 * row, 2 * row + 4), range(2 * column, 2 * column + 4))
    if part == "letter":
        start = min(max(int(slot[-1]) - 1, 0), SIDE - 3)
        return _block(range(2 * int(slot[3]), 2 * int(slot[3]) + 4), range(start, start + 3))
    if slot.startswith("row"):
        start = 2 * int(slot[3])
        return _block(range(start, start + 4), range(SIDE))
    if part == "value":
        column = (LEFT + 4 + 19 * int(slot[-1])) // PATCH_SIZE
        return _block(range(SIDE), range(column, column + 2))
    if part == "topic":
        return _block(range(1), range(SIDE))
    if part == "labels":
        return _block(range(SIDE - 1, SIDE), range(SIDE))
    return list(range(0, SIDE * SIDE, 3))


class SlotReader(nn.Module):
    """Reads each slot from the features of the patches that show it, by a small network a part."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.readers = nn.ModuleDict()
        for slot in SLOTS:
            part = part_of(slot)
            if part not in self.readers:
                self.readers[part] = nn.Sequential(
                    nn.Linear(width * len(window_of(slot)), READER_WIDTH),
                    nn.GELU(),
                    nn.Linear(READER_WIDTH, PARTS[part]),
                )

    def forward(
        self,
        features: torch.Tensor,
        labels: Labels,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Sum over the parts of the mean cross-entropy, and accuracy by part.

        features: [I, patches, width]. labels: as in `Batch`.
        """
        losses, accuracy = [], {}
        for part, logits, target in self._read(features, labels):
            losses.append(F.cross_entropy(logits, target))
            right = _right(part, logits, target)
            if len(right):
                accuracy[part] = right.float().mean().item()
        return torch.stack(losses).sum(), accuracy

    def hits(self, features: torch.Tensor, labels: Labels) -> dict[str, tuple[int, int]]:
        """By part, how many of the slots that are not empty it reads, and how many there are."""
        found = {}
        for part, logits, target in self._read(features, labels):
            right = _right(part, logits, target)
            found[part] = int(right.sum()), len(right)
        return found

    def _read(
        self, features: torch.Tensor, labels: Labels
    ) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Part, logits [N, classes] and right classes [N]."""
        features = self.norm(features)
        grouped: dict[str, tuple[list, list]] = {}
        for slot, (rows, values) in labels.items():
            seen, wanted = grouped.setdefault(part_of(slot), ([], []))
            seen.append(features[rows][:, window_of(slot)].flatten(1))
            wanted.append(torch.from_numpy(values))
        for part, (seen, wanted) in grouped.items():
            logits = self.readers[part](torch.cat(seen)).float()
            yield part, logits, torch.cat(wanted).to(logits.device)


def _right(part: str, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Whether each slot that is not empty was read."""
    filled = (target > 0) | (part in NEVER_EMPTY)
    return (logits.argmax(-1) == target)[filled]
