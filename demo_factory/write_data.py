"""The demo world on disk, in the form that `vllm-msd train` reads.

    vllm-msd demo data --output build/world --records 4000

writes `text.json` (ShareGPT form), `multimodal.json` (LLaVA form) and `images/`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .data import MIX
from .world import IMAGE_KINDS, packed, sample
from .world.base import Sample, seeded

# Conversations as long as those that the target was trained on.
TURNS = 5


def write_data(
    folder: Path,
    records: int,
    seed: int = 0,
    split: str = "train",
    kinds: tuple[str, ...] = (),
    target: str = "",
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Path]:
    """Write so many text and so many multimodal conversations.

    Args:
        folder: to write to.
        records: of each sort.
        seed: of contents and wording.
        split: ``train``: conversations of several questions. ``test``: held-out contents, as the
            demo asks about them.
        kinds: of multimodal work (default: all, in the shares that the target was trained on).
        target: folder of a target whose greedy replies take the place of the world's last answers.
        report: called with a line per stage.

    Returns:
        Paths of the two files by name.
    """
    images = {k: w for k, w in MIX.items() if k in (kinds or IMAGE_KINDS)}
    found = {}
    for name, shares in (("text", {"text": 1.0}), ("multimodal", images)):
        rng = seeded("write", name, seed)
        samples = []
        for _ in range(records):
            kind = rng.choices(list(shares), list(shares.values()))[0]
            number = rng.getrandbits(40)
            # A target's own reply is to a single question, as in serving.
            if split == "train" and not target:
                samples.append(packed(kind, number, TURNS))
            else:
                samples.append(sample(kind, number, split))
        if target:
            report(f"{name}: letting the target answer {records} questions")
            answer_all(samples, target)
        found[name] = folder / f"{name}.json"
        write_records(found[name], samples)
        report(f"wrote {found[name]}")
    return found


def write_records(path: Path, samples: list[Sample]) -> None:
    """Write conversations to a JSON file, and their images to ``images/`` beside it."""
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    rows = [row_of(f"{path.stem}-{i}", item, path.parent) for i, item in enumerate(samples)]
    path.write_text(json.dumps(rows, indent=1) + "\n")


def row_of(identity: str, item: Sample, folder: Path) -> dict[str, Any]:
    """A conversation as files have it; its image is written to ``images/`` in the folder."""
    turns = []
    for message in item.messages:
        text = "".join(
            "<image>\n" if part["type"] == "image" else part["text"] for part in message["content"]
        )
        turns.append({"from": "human" if message["role"] == "user" else "gpt", "value": text})
    row: dict[str, Any] = {"id": identity, "kind": item.kind, "conversations": turns}
    if item.images:
        row["image"] = f"images/{identity}.png"
        item.images[0].save(folder / row["image"])
    return row


def answer_all(samples: list[Sample], folder: str) -> None:
    """Put the target's greedy replies in place of the last answers."""
    from vllm_msd.training.targets import Target

    from .replies import greedy_replies, reply_text

    target = Target.load(folder, "float32")
    # Like lengths together, against padding.
    order = sorted(samples, key=lambda item: (len(item.images), len(str(item.prompt))))
    with tqdm(total=len(order), unit="reply") as bar:
        replies = greedy_replies(target, order, report=bar.update)
    for item, reply in zip(order, replies, strict=True):
        text = reply_text(target, reply)
        # A reply that was cut off or is empty keeps the world's answer.
        if text and reply.tokens[-1] in target.end_ids:
            item.answer = text
