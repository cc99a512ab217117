"""Drafts for the real target: acceptance as data went by, with pictures in the draft and without.

    python -m benchmarks.real_draft --work build/real --output benchmarks/results/real_draft.json
    python -m benchmarks.real_draft --work build/real --variants coupled --train-only

Works on what `python -m demo_factory.real.build` left in --work. Each variant is a draft:

text      the build's first stage, one pass over talks; with what was accepted of it on the way
final     the build's second stage, visual rows decoupled: what ships
coupled   the same with visual rows through the fusion layer, as in EAGLE; trained here

Acceptance is counted as ``vllm-msd eval`` does, on the target that sees, five drafted tokens a
verification, on held-out prompts, and of the second stage on questions about pictures, too: with
the picture, with another one's in the draft, and with a grey one. What is done is kept in --work,
so a broken call goes on.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_msd.errors import ConfigError, MSDError
from vllm_msd.storage import write_json

VARIANTS = ("text", "final", "coupled")
OF_BUILD = {"text": "draft-text", "final": "draft"}  # folders of its own runs
PROMPTS, PER_KIND = 60, 10


def main() -> int:
    """Train what is missing, count, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_draft",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, default=Path("build/real"), help="folder of a build")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--train-only", action="store_true", help="leave the counting out")
    parser.add_argument("--output", type=Path, help="write figures as JSON")
    parser.add_argument(
        "--set", nargs="*", default=[], help="more options of `vllm-msd train`, without the dashes"
    )
    args = parser.parse_args()

    from vllm_msd.demo import paths
    from vllm_msd.provenance import provenance

    facts = provenance(variants=args.variants, prompts=PROMPTS, per_kind=PER_KIND)
    try:
        paths.use_factory()
        for name in args.variants:
            train(name, args.work, [f"--{one}" for one in args.set])
        if args.train_only:
            return 0
        found = {name: measure(name, args.work) for name in tqdm(args.variants)}
    except MSDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1))
    if args.output:
        write_json(args.output, {**facts, "variants": found})
    return 0


def folder_of(name: str, work: Path) -> Path:
    """Where a variant's run lies."""
    return work / OF_BUILD.get(name, f"drafts/{name}")


def train(name: str, work: Path, more: list[str]) -> None:
    """One run, unless it is done, or the build's own."""
    from demo_factory.real.build import say, trained_draft
    from vllm_msd.demo.real.pair import real_target

    output = folder_of(name, work)
    if name in OF_BUILD:
        if not (output / "best").is_dir():
            raise ConfigError(f"{output}: no draft. `python -m demo_factory.real.build` makes it.")
        return
    target = real_target(say, tuned=work / "target" / "pictures")
    data = [
        *("--text-data", str(work / "own" / "own.json")),
        *("--multimodal-data", str(work / "pictures" / "pictures.json")),
        *("--init", str(folder_of("text", work) / "best"), "--visual-rows", "coupled"),
    ]
    trained_draft("draft", target, output, *data, *more)


def measure(name: str, work: Path) -> dict[str, Any]:
    """Tokens per verification by kind of work; and what the run was trained on."""
    folder = folder_of(name, work)
    kept = folder / "measured.json"
    if not kept.is_file():
        write_json(kept, count(name, work))
    about = json.loads((folder / "best" / "provenance.json").read_text())
    parts = {part: about[part] for part in ("minutes", "machine", "versions", "data")}
    size = about["settings"]["batch_size"]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    learning = [
        {"records": row["step"] * size, "acceptance_length": row["acceptance_length"]["all"]}
        for row in log
        if "acceptance_length" in row
    ]
    return {**json.loads(kept.read_text()), **parts, "learning": learning}


def count(name: str, work: Path) -> dict[str, Any]:
    """Acceptance of one draft on held-out prompts, and on questions about pictures."""
    from demo_factory import evaluate as world
    from demo_factory.real.build import say
    from demo_factory.walks import WALK
    from demo_factory.world import IMAGE_KINDS
    from vllm_msd.checkpoint import load_draft
    from vllm_msd.demo.real.pair import real_target
    from vllm_msd.draft import MSDDraft
    from vllm_msd.training.evaluate import evaluate
    from vllm_msd.training.initial import in_float
    from vllm_msd.training.targets import Target

    folder = real_target(say, tuned=work / "target" / "pictures")
    draft_folder = folder_of(name, work) / "best"
    text = evaluate(
        folder, draft_folder, [str(work / "held_out.json")], records=PROMPTS,
        target_dtype="float32", device="cpu", batch_size=16,
    )  # fmt: skip
    found: dict[str, Any] = {"text": {"all": text["all"], "kinds": text["kinds"]}}
    if name == "text":
        return found
    target = Target.load(folder, "float32")
    config, state = load_draft(draft_folder)
    draft = MSDDraft.from_state_dict(config, in_float(state)).eval()
    replies = world.replies_by_kind(target, PER_KIND, (*IMAGE_KINDS, WALK))
    rows = "coupled" if name == "coupled" else "decoupled"
    shown = {"own": None, "other": world.with_other_images, "grey": grey_images(target)}
    for seen, change in shown.items():
        figures = world.acceptance(target, draft, replies, change, rows)
        found[seen] = {kind: one.as_dict() for kind, one in figures.items()}
    return found


def grey_images(target: Any) -> Callable[[Any], Any]:
    """Changes a batch's visual rows to those of a picture that shows nothing."""
    from PIL import Image

    from demo_factory.world.base import IMAGE_SIZE
    from vllm_msd.training.data.batches import collate

    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    grey = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "grey")
    features = target.features(collate([target.renderer([], 1024).ask(ask, [grey])], target.pad_id))
    rows = features.embeds[features.visual]

    def change(seen: Any) -> Any:
        embeds = seen.embeds.clone()
        embeds[seen.visual] = rows.repeat(int(seen.visual.sum()) // len(rows), 1)
        return replace(seen, embeds=embeds)

    return change


if __name__ == "__main__":
    sys.exit(main())
