"""Training batches from the world: packed conversations, encoded and grouped by length."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from .target_model import VISUAL_TOKENS
from .tokenizer import render_parts
from .world import packed
from .world.base import Sample, seeded

# CLIP's own constants, as the saved image processor applies them.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Share of each kind in training. Reading signs and charts needs the most images.
MIX = {
    "vqa": 0.15,
    "textvqa": 0.25,
    "caption": 0.13,
    "chart": 0.15,
    "reasoning": 0.14,
    "conversation": 0.10,
    "text": 0.08,
}
# The first stage of the target's training sees pictures only; letters take longest.
VISION_MIX = {"vqa": 0.22, "textvqa": 0.5, "chart": 0.13, "reasoning": 0.15}

# The text of a conversation in pieces: a question with all that stands around it, its answer, ...
Render = Callable[[list[dict[str, Any]]], list[str]]
# Slot name -> rows of the batch's images [N] and class ids [N], int64. Not tensors: a process that
# prepares batches would hand each of those over as a file of its own.
Labels = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass
class Batch:
    """Right-padded training sequences.

    input_ids: int64 [B, S], image placeholders expanded to 64 tokens each.
    loss_mask: bool [B, S], true where the token belongs to an answer (eos included).
    images: uint8 [I, H, W, 3], one per sequence that has an image, in order.
    kinds: kind of every sequence.
    labels: of the images.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    images: torch.Tensor
    kinds: list[str]
    labels: Labels

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device."""
        moved = [one.to(device) for one in (self.input_ids, self.loss_mask, self.images)]
        return Batch(*moved, self.kinds, self.labels)


def encode(
    sample: Sample,
    tokenizer: PreTrainedTokenizerFast,
    cap: int,
    render: Render = render_parts,
) -> tuple[list[int], list[bool]]:
    """Token ids and answer mask of a conversation, cut to whole turns of `cap` text tokens."""
    ids: list[int] = []
    mask: list[bool] = []
    pieces = render(sample.messages)
    encoded = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    for question, answer in zip(encoded[::2], encoded[1::2], strict=True):
        if ids and len(ids) + len(question) + len(answer) > cap:
            break
        ids += question + answer
        mask += [False] * len(question) + [True] * len(answer)
    full_ids: list[int] = []
    full_mask: list[bool] = []
    for token, flag in zip(ids, mask, strict=True):
        repeat = VISUAL_TOKENS if token == image_id else 1
        full_ids += [token] * repeat
        full_mask += [flag] * repeat
    return full_ids, full_mask


def pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 [I, H, W, 3] to normalised float32 [I, 3, H, W]."""
    scaled = images.float() / 255
    mean, std = (scaled.new_tensor(one) for one in (CLIP_MEAN, CLIP_STD))
    scaled = (scaled - mean) / std
    return scaled.permute(0, 3, 1, 2).contiguous()


def _image_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.uint8)


def collate(rows: list[tuple[Sample, list[int], list[bool]]], pad_id: int) -> Batch:
    """One padded batch."""
    width = max(len(ids) for _, ids, _ in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    loss_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    arrays: list[np.ndarray] = []
    labels: dict[str, tuple[list[int], list[int]]] = {}
    for index, (sample, ids, mask) in enumerate(rows):
        input_ids[index, : len(ids)] = torch.tensor(ids)
        loss_mask[index, : len(ids)] = torch.tensor(mask)
        if sample.images:
            for slot, value in sample.labels.items():
                places, values = labels.setdefault(slot, ([], []))
                places.append(len(arrays))
                values.append(value)
            arrays.append(_image_array(sample.images[0]))
    stacked = torch.from_numpy(np.stack(arrays)) if arrays else torch.zeros(0, 1, 1, 3).byte()
    numbers = {k: (np.array(p), np.array(v)) for k, (p, v) in labels.items()}
    return Batch(input_ids, loss_mask, stacked, [s.kind for s, _, _ in rows], numbers)


class TrainingStream(IterableDataset):
    """An endless, deterministic stream of batches, or its part in each process of a `DataLoader`.

    Args:
        tokenizer: of the target.
        seed: of the contents.
        batch_size: conversations in a batch.
        cap: most text tokens of one.
        start: skips what a resumed run has seen.
        mix: shares of the kinds.
        draw: a conversation of a kind, by a number.
        render: its text (see `encode`).
        pool: batches whose conversations are sorted by length together.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        seed: Any,
        batch_size: int,
        cap: int,
        start: int = 0,
        mix: dict[str, float] | None = None,
        draw: Callable[[str, int], Sample] = packed,
        render: Render = render_parts,
        pool: int = 16,
    ) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.batch_size = batch_size
        self.cap = cap
        self.start = start
        self.mix = mix or MIX
        self.draw = draw
        self.render = render
        self.pool = pool

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        seed = self.seed if worker is None else (self.seed, worker.id)
        pool_index = self.start
        kinds, weights = zip(*self.mix.items(), strict=True)
        while True:
            # Sequences of similar length share a batch.
            rng = seeded("pool", seed, pool_index)
            rows = []
            for _ in range(self.pool * self.batch_size):
                sample = self.draw(rng.choices(kinds, weights)[0], rng.getrandbits(40))
                rows.append((sample, *encode(sample, self.tokenizer, self.cap, self.render)))
            rows.sort(key=lambda row: len(row[1]))
            chunks = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            rng.shuffle(chunks)
            for chunk in chunks:
                yield collate(chunk, self.tokenizer.pad_token_id)
            pool_index += 1
