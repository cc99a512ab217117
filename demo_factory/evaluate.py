"""How good the demo pair is, on held-out contents: accuracy by kind, and acceptance offline.

    python -m demo_factory.evaluate --target build/target/model --draft build/draft

Accuracy stands next to an even guess and to the answers the target gives when it is shown another
request's image, which is what wording and habit alone are worth.
Acceptance is counted on the target's greedy replies as `vllm-msd eval` does (see
`training.acceptance`), with the right image in the draft and with another request's.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_msd.checkpoint import load_draft
from vllm_msd.demo.scoring import score
from vllm_msd.draft import MSDDraft
from vllm_msd.provenance import provenance
from vllm_msd.training.acceptance import Figures, Reply, chain_acceptance
from vllm_msd.training.initial import in_float
from vllm_msd.training.targets import Features, Target

from .held_out import FIRST_SEED
from .replies import MAX_REPLY, greedy_replies, reply_text
from .target_model import VISUAL_TOKENS
from .walks import WALK, walks
from .world import IMAGE_KINDS, KINDS, Sample, sample

BATCH = 25
# Tokens drafted per verification.
STEPS = 5

# Results of the additions and subtractions asked for lie in this range.
GUESS_RANGE = 40

Answered = dict[str, list[tuple[Sample, Reply]]]


def random_guess(sample: Sample) -> float | None:
    """What an even guess among the question's options scores; None for captions.

    A caption has no list of options: compare with the score of another image's caption.
    """
    key = sample.answer_key
    if key["type"] == "choice":
        return 1 / len(key["options"])
    if key["type"] == "sequence":
        chance = 1.0
        for index in range(len(key["values"])):
            chance /= max(1, len(key["options"]) - index)
        return chance
    if key["type"] == "phrases" and len(key["values"]) == 1 and key["values"][0].isdigit():
        return 1 / GUESS_RANGE
    return None


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
    target: Target,
    per_kind: int,
    kinds: Sequence[str],
    wrong_image: bool = False,
    max_tokens: int = MAX_REPLY,
) -> Answered:
    """Greedy replies to held-out prompts. With `wrong_image` each prompt has another's image."""
    found: Answered = {}
    for kind in tqdm(kinds, desc="answering"):
        if kind == WALK:
            samples = walks(per_kind, FIRST_SEED, "test")
        else:
            samples = [sample(kind, FIRST_SEED + i, "test") for i in range(per_kind)]
        if wrong_image:
            images = [s.images for s in samples]
            for index, item in enumerate(samples):
                item.images = images[(index + 1) % len(images)]
        replies = greedy_replies(target, samples, max_tokens, beyond=STEPS)
        found[kind] = list(zip(samples, replies, strict=True))
    return found


def accuracy(target: Target, replies: Answered) -> dict[str, float]:
    """Mean score by kind."""
    return {
        kind: sum(score(item, reply_text(target, reply)) for item, reply in rows) / len(rows)
        for kind, rows in replies.items()
    }


def acceptance(
    target: Target,
    draft: MSDDraft,
    replies: Answered,
    seen: Callable[[Features], Features] | None = None,
    visual_rows: str = "decoupled",
) -> dict[str, Figures]:
    """Greedy chain acceptance by kind.

    seen: changes what the draft (not the target) is given of questions with an image.
    visual_rows: how the draft was trained to take them.
    """
    found: dict[str, Figures] = {}
    for kind, rows in replies.items():
        change = None if kind == "text" else seen
        talks = [reply for _, reply in rows]
        found |= chain_acceptance(target, draft, talks, STEPS, visual_rows, BATCH, change)
    return found


def with_other_images(features: Features) -> Features:
    """Each request of the batch, all with one image, gets the image of the one before."""
    embeds = features.embeds.clone()
    images = embeds[features.visual].unflatten(0, (-1, VISUAL_TOKENS))
    embeds[features.visual] = images.roll(1, 0).flatten(0, 1)
    return replace(features, embeds=embeds)


def evaluate(target_path: Path, draft_path: Path | None, per_kind: int) -> dict[str, Any]:
    """All figures, ready for JSON."""
    target = Target.load(target_path, "float32")
    replies = replies_by_kind(target, per_kind, KINDS)
    right = accuracy(target, replies)
    blind = accuracy(target, replies_by_kind(target, per_kind, IMAGE_KINDS, wrong_image=True))
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
    draft = MSDDraft.from_state_dict(config, in_float(state)).eval()
    for name, seen in (
        ("acceptance", None),
        ("acceptance_wrong_image_in_draft", with_other_images),
    ):
        found = acceptance(target, draft, replies, seen)
        found["all_image_kinds"] = Figures()
        for kind in IMAGE_KINDS:
            found["all_image_kinds"].join(found[kind])
        table = {kind: round(f.count.acceptance_length, 3) for kind, f in found.items()}
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
