"""How good the demo pair is, on held-out contents: accuracy by kind, and acceptance offline.

    python -m vllm_msd.demo.evaluate --target build/target/model --draft build/draft

Accuracy stands next to an even guess and to the answers the target gives when it is shown another
request's image, which is what wording and habit alone are worth.
Acceptance is replayed from the target's greedy replies (see `training.unroll`), with the right
image in the draft and with another request's.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from vllm_msd.checkpoint import load_draft
from vllm_msd.draft import MSDDraft
from vllm_msd.provenance import provenance
from vllm_msd.training.features import target_features
from vllm_msd.training.unroll import ChainCount, replay_chains, unroll

from .data import collate, pixels
from .draft_data import generate_replies
from .world import KINDS, Sample, random_guess, sample, score

BATCH = 25
FIRST_SEED = 10_000


def load_target(path: Path) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerFast]:
    """The target in float32 and its tokenizer."""
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(path)


def _guess(samples: list[Sample]) -> float:
    """What an even guess scores; for captions, the caption of the next image."""
    scores = []
    for index, item in enumerate(samples):
        chance = random_guess(item)
        if chance is None:
            chance = score(item, samples[(index + 1) % len(samples)].answer)
        scores.append(chance)
    return sum(scores) / len(scores)


def replies_by_kind(
    target: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    per_kind: int,
    kinds: list[str],
    wrong_image: bool = False,
) -> dict[str, list[tuple[Sample, list[int], list[bool]]]]:
    """Greedy replies to held-out prompts. With `wrong_image` each prompt has another's image."""
    found = {}
    for kind in tqdm(kinds, desc="answering"):
        samples = [sample(kind, FIRST_SEED + i, "test") for i in range(per_kind)]
        if wrong_image:
            images = [s.images for s in samples]
            for index, item in enumerate(samples):
                item.images = images[(index + 1) % len(images)]
        rows = []
        for start in range(0, per_kind, BATCH):
            rows += generate_replies(target, tokenizer, samples[start : start + BATCH])
        found[kind] = rows
    return found


def _reply_text(tokenizer: PreTrainedTokenizerFast, row: tuple) -> str:
    _, ids, mask = row
    reply = [token for token, flag in zip(ids, mask, strict=True) if flag]
    return tokenizer.decode(reply, skip_special_tokens=True)


def accuracy(tokenizer: PreTrainedTokenizerFast, replies: dict[str, list]) -> dict[str, float]:
    """Mean score by kind."""
    return {
        kind: sum(score(row[0], _reply_text(tokenizer, row)) for row in rows) / len(rows)
        for kind, rows in replies.items()
    }


@torch.no_grad()
def acceptance(
    target: LlavaForConditionalGeneration,
    draft: MSDDraft,
    replies: dict[str, list],
    pad_id: int,
    steps: int = 5,
    swap_images: bool = False,
) -> dict[str, ChainCount]:
    """Greedy chain acceptance by kind, replayed offline.

    swap_images: give the draft (not the target) the next request's image.
    """
    counts: dict[str, ChainCount] = defaultdict(ChainCount)
    for kind, rows in replies.items():
        for start in range(0, len(rows), BATCH):
            chunk = rows[start : start + BATCH]
            batch = collate(chunk, pad_id)
            images = pixels(batch.images) if len(batch.images) else None
            other = images.roll(1, 0) if swap_images and images is not None else None
            features = target_features(target, batch.input_ids, batch.loss_mask, images, other)
            matches = []
            for out in unroll(draft, features.rows, steps):
                guess = target.lm_head(out).argmax(-1)
                truth = batch.input_ids.roll(-2, 1)
                matches.append(guess == truth)
            stacked = torch.stack(matches)
            for row, (_, ids, mask) in enumerate(chunk):
                replay_chains(stacked[:, row], mask.index(True), len(ids) - 1, counts[kind])
    return counts


def evaluate(target_path: Path, draft_path: Path | None, per_kind: int) -> dict[str, Any]:
    """All figures, ready for JSON."""
    target, tokenizer = load_target(target_path)
    replies = replies_by_kind(target, tokenizer, per_kind, KINDS)
    right = accuracy(tokenizer, replies)
    image_kinds = [kind for kind in KINDS if kind != "text"]
    blind = accuracy(
        tokenizer, replies_by_kind(target, tokenizer, per_kind, image_kinds, wrong_image=True)
    )
    result: dict[str, Any] = {
        "accuracy": {
            kind: {
                "right": round(right[kind], 3),
                "random_guess": round(_guess([row[0] for row in rows]), 3),
                "wrong_image": round(blind[kind], 3) if kind in blind else None,
            }
            for kind, rows in replies.items()
        }
    }
    if draft_path is None:
        return result
    config, state = load_draft(draft_path)
    draft = MSDDraft.from_state_dict(config, {k: v.float() for k, v in state.items()}).eval()
    for name, swap in (("acceptance", False), ("acceptance_wrong_image_in_draft", True)):
        counts = acceptance(target, draft, replies, tokenizer.pad_token_id, swap_images=swap)
        table = {kind: round(c.acceptance_length, 3) for kind, c in counts.items()}
        pictured = [counts[kind] for kind in image_kinds]
        table["all_image_kinds"] = round(
            sum(c.tokens for c in pictured) / sum(c.verifications for c in pictured), 3
        )
        result[name] = table
    return result


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--per-kind", type=int, default=100)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(arguments)
    settings = {"per_kind": args.per_kind, "first_seed": FIRST_SEED, "split": "test"}
    header = provenance(**settings)
    result = header | evaluate(args.target, args.draft, args.per_kind)
    text = json.dumps(result, indent=2)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
