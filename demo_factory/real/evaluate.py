"""What the real target learned, on contents and pictures that its training never saw.

    python -m demo_factory.real.evaluate --output build/real --json evaluation.json

Its accuracy on the drawn world's kinds and on `easy-vqa`'s own test split (as many questions for
each answer), each with the right picture and with another question's; whether it reads on while it
describes; and how well it still speaks: the perplexity of what it said to held-out prompts before
it was taught to see, by it before and after.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from vllm_msd.demo.real.pair import PICTURES, real_target
from vllm_msd.demo.scoring import score
from vllm_msd.errors import MSDError
from vllm_msd.provenance import provenance
from vllm_msd.storage import check_folder, write_text
from vllm_msd.training.data.batches import collate
from vllm_msd.training.data.records import parse_record
from vllm_msd.training.targets import Target

from .. import evaluate as world
from ..replies import greedy_replies, reply_text
from ..walks import reading
from ..world.base import Sample
from .answers import answer
from .build import prompts_in, say
from .pictures import ANSWERS, GROUPS, easy_test

WALKS = 150
TALKS = 150  # held-out prompts
SEED = 70_000
BATCH = 8


def easy_accuracy(target: Target, per_answer: int) -> dict[str, float]:
    """Share of right answers to `easy-vqa`'s test questions, with their and with other pictures."""
    samples = easy_test(per_answer)
    images = [one.images for one in samples]
    guess = sum(len(group) / len(group) for group in GROUPS) / len(ANSWERS)
    found = {"random_guess": round(guess, 3), "questions": len(samples)}
    for name, shift in (("right", 0), ("wrong_image", 1)):
        for index, one in enumerate(samples):
            one.images = images[(index + shift) % len(images)]
        found[name] = round(_share_right(target, samples), 3)
    return found


def _share_right(target: Target, samples: list[Sample]) -> float:
    replies = greedy_replies(target, samples, max_tokens=8)
    pairs = zip(samples, replies, strict=True)
    return sum(score(one, reply_text(target, said)) for one, said in pairs) / len(samples)


@torch.no_grad()
def perplexity(target: Target, talks: Path) -> float:
    """Of the replies in a file of conversations without pictures."""
    renderer = target.renderer([], 1024)
    rows = json.loads(talks.read_text("utf-8"))
    rendered = [renderer.render(parse_record(row)) for row in rows]
    rendered.sort(key=lambda one: len(one.input_ids))
    total, count = 0.0, 0
    for start in tqdm(range(0, len(rendered), BATCH), desc="perplexity"):
        batch = collate(rendered[start : start + BATCH], target.pad_id).to(target.device)
        hidden = target.features(batch).hidden[:, :-1]
        said = batch.answer_mask[:, 1:]
        logits = (hidden[said] @ target.head.T).float()
        wanted = batch.input_ids[:, 1:][said]
        total += F.cross_entropy(logits, wanted, reduction="sum").item()
        count += len(wanted)
    return math.exp(total / count)


def evaluate(folder: Path, tuned: Path, per_kind: int) -> dict[str, Any]:
    """All figures, ready for JSON."""
    base, seeing = real_target(say, tuned=None), real_target(say, tuned=tuned)
    _, held_out = prompts_in(folder)
    talks = answer("held-out", held_out[:TALKS], folder / "own", base)
    before = perplexity(Target.load(base, "float32"), talks)
    target = Target.load(seeing, "float32")
    after = perplexity(target, talks)
    found = world.evaluate(seeing, None, per_kind)
    found["accuracy"]["easy-vqa"] = easy_accuracy(target, per_kind)
    found["walks"] = {"requests": WALKS, "sorts": reading(seeing, WALKS, SEED)}
    found["perplexity"] = {
        "replies": TALKS,
        "before": round(before, 4),
        "after": round(after, 4),
        "change": round(after / before - 1, 4),
    }
    return found | {"slots": json.loads((tuned / "slots.json").read_text())}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m demo_factory.real.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("build/real"), help="folder of a build")
    parser.add_argument(
        "--pictures", type=Path, default=PICTURES, help="what was trained (default: what ships)"
    )
    parser.add_argument("--per-kind", type=int, default=60, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    facts = provenance(per_kind=args.per_kind)
    try:
        if args.json:
            check_folder(args.json.parent, "json")
        found = json.dumps(facts | evaluate(args.output, args.pictures, args.per_kind), indent=1)
        if args.json:
            write_text(args.json, found + "\n")
    except MSDError as error:
        sys.exit(f"error: {error}")
    print(found)


if __name__ == "__main__":
    main()
