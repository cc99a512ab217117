"""Batches for training the demo draft: world conversations and the target's own replies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from vllm_msd.training.train_draft import DraftBatch

from .data import MIX, TrainingStream, collate, encode, pixels
from .world import IMAGE_KINDS, KINDS, sample
from .world.base import Sample, seeded

# Replies generated at once, and how many times each is used.
POOL = 48
REUSE = 2
MAX_REPLY = 120


class WorldBatches:
    """Callable by kind of batch: `text`, `image` or `replies` (see `DraftTrainer`)."""

    def __init__(
        self,
        target: LlavaForConditionalGeneration,
        folder: Path,
        seed: Any,
        batch_size: int,
        cap: int,
    ) -> None:
        self.target = target
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.batch_size = batch_size
        # Contents that the target has not been trained on: its habits there are what matters.
        stream_seed = ("draft", seed)
        images = {kind: share for kind, share in MIX.items() if kind in IMAGE_KINDS}
        self.streams = {
            "image": iter(TrainingStream(self.tokenizer, stream_seed, batch_size, cap, mix=images)),
            "text": iter(
                TrainingStream(self.tokenizer, stream_seed, batch_size, cap, mix={"text": 1.0})
            ),
        }
        self.replies = self._reply_batches(seeded("replies", seed))

    def __call__(self, kind: str) -> DraftBatch:
        """The next batch of that kind."""
        batch = next(self.replies if kind == "replies" else self.streams[kind])
        images = pixels(batch.images) if len(batch.images) else None
        return DraftBatch(batch.input_ids, batch.loss_mask, images)

    def _reply_batches(self, rng: Any) -> Iterator:
        while True:
            kinds = [rng.choice(KINDS) for _ in range(POOL)]
            samples = [sample(kind, rng.getrandbits(40), "train") for kind in kinds]
            rows = generate_replies(self.target, self.tokenizer, samples, greedy=rng.random() < 0.7)
            for _ in range(REUSE):
                rng.shuffle(rows)
                size = 2 * self.batch_size  # replies alone are short
                for start in range(0, len(rows) - size + 1, size):
                    yield collate(rows[start : start + size], self.tokenizer.pad_token_id)


@torch.no_grad()
def generate_replies(
    target: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    samples: list[Sample],
    greedy: bool = True,
    max_reply: int = MAX_REPLY,
) -> list[tuple[Sample, list[int], list[bool]]]:
    """The target's replies to the samples' prompts: (sample, ids, mask of the last reply)."""
    prompts = []
    for item in samples:
        ids, mask = encode(item, tokenizer, 10**6)
        # The last answer is the trailing run of answer tokens.
        end = len(ids)
        while mask[end - 1]:
            end -= 1
        prompts.append(ids[:end])
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    batch = collate(
        [(s, ids, [False] * len(ids)) for s, ids in zip(samples, prompts, strict=True)], pad
    )
    left = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    pictures = {"pixel_values": pixels(batch.images)} if len(batch.images) else {}
    out = target.generate(
        input_ids=left,
        attention_mask=(left != pad).long(),
        **pictures,
        max_new_tokens=max_reply,
        do_sample=not greedy,
        temperature=None if greedy else 1.0,
        top_k=None if greedy else 0,
        top_p=None,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )[:, width:]
    rows = []
    for item, prompt, reply in zip(samples, prompts, out.tolist(), strict=True):
        if tokenizer.eos_token_id in reply:
            reply = reply[: reply.index(tokenizer.eos_token_id) + 1]
        ids = prompt + reply
        rows.append((item, ids, [False] * len(prompt) + [True] * len(reply)))
    return rows
