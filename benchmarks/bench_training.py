"""Where the time of a training step goes: the frozen target's forward pass, or the draft's side.

    python benchmarks/bench_training.py --output benchmarks/results/training_time.json

The target is the demo's, widened to a real shape (`--size small` takes it as it is), in bf16. Steps
are those of `vllm-msd train`: `data` reads and renders records, `target` is the target's forward
pass, `draft` all the rest: the draft forward and back, both losses, clipping, AdamW. Figures are
sums over the steps of a run, the first of which only warms up.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from vllm_msd.demo import paths
from vllm_msd.provenance import provenance
from vllm_msd.training import TrainSettings
from vllm_msd.training.engine import Trainer
from vllm_msd.training.targets import Target
from vllm_msd.training.window import PHASES

paths.use_factory()
from demo_factory.write_data import write_data  # noqa: E402

# Most that a step may spend on the draft's side, with the paper's single drafting step.
LIMIT = 0.25
DRAFT_STEPS = (1, 3)


def measure(
    target: Target, world: dict[str, Path], output: Path, args: argparse.Namespace, draft_steps: int
) -> dict[str, Any]:
    """Seconds of each phase over `args.steps` steps, and what follows from them."""
    settings = TrainSettings(
        target=target.name,
        output=str(output),
        text_data=[str(world["text"])],
        multimodal_data=[str(world["multimodal"])],
        curriculum="mixed",
        steps=args.steps + 1,
        batch_size=args.batch_size,
        draft_steps=draft_steps,
        gradient_checkpointing=args.gradient_checkpointing,
        warmup_steps=1,
        eval_records=0,
        length_pool=1,
        log_every=1,
        device="cpu",
    )
    Trainer(settings, target).run()
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()][1:]
    seconds = {name: sum(row["seconds"][name] for row in rows) for name in PHASES}
    total = sum(seconds.values())
    tokens = sum(row["tokens_per_second"] * sum(row["seconds"].values()) for row in rows)
    return {
        "draft_steps": draft_steps,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "tokens_per_second": round(tokens / total, 1),
        "draft_share": round(seconds["draft"] / total, 4),
        "target_share": round(seconds["target"] / total, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="350M", help="of the target, or small (default: 350M)")
    parser.add_argument("--steps", type=int, default=6, help="timed, of each case")
    parser.add_argument("--batch-size", type=int, default=8, help="records per step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    result = provenance(**settings, dtype="bfloat16")
    small = args.size == "small"
    pair = paths.demo_pair() if small else paths.wide_pair(args.size, report=print)
    target = Target.load(pair.target, "bfloat16", device="cpu")
    result["target_parameters"] = sum(p.numel() for p in target.model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        world = write_data(Path(folder) / "world", args.batch_size * (args.steps + 1))
        result["cases"] = [
            measure(target, world, Path(folder) / f"run-{number}", args, number)
            for number in DRAFT_STEPS
        ]
    for case in result["cases"]:
        print(
            f"{case['draft_steps']} drafting step(s): {case['draft_share']:.1%} of a step on the "
            f"draft's side, {case['target_share']:.1%} on the target's forward pass; "
            f"{case['tokens_per_second']:.0f} tokens/s"
        )
    first = result["cases"][0]["draft_share"]
    result["limit"], result["within_limit"] = LIMIT, first <= LIMIT
    print(f"limit {LIMIT:.0%} with one drafting step: {'kept' if first <= LIMIT else 'exceeded'}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
