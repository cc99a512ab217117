"""``vllm-msd train`` and ``vllm-msd eval``."""

import argparse
import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from vllm_msd.cli.arguments import positive
from vllm_msd.errors import TRAINING_MISSING, ConfigError
from vllm_msd.storage import check_file, write_json
from vllm_msd.training.settings import VISUAL_ROWS, TrainSettings, add_flags, read_yaml

_TRAIN_EXAMPLES = """examples:
  a draft for LLaVA-1.5, as published:
    vllm-msd train --target llava-hf/llava-1.5-7b-hf --output drafts/llava \\
        --text-data sharegpt.jsonl --multimodal-data llava_v1_5_mix665k.json \\
        --image-root images --epochs 2

  the settings in a file, one of them changed:
    vllm-msd train --config run.yaml --learning-rate 1e-4

  on eight GPUs:
    torchrun --nproc-per-node 8 -m vllm_msd.cli.main train --config run.yaml

  what it would take, before anything is loaded:
    vllm-msd train --config run.yaml --dry-run

  going on after a kill:
    vllm-msd train --config run.yaml --resume
"""
_EVAL_EXAMPLES = """examples:
  vllm-msd eval --target llava-hf/llava-1.5-7b-hf --draft drafts/llava/best \\
      --data llava_v1_5_mix665k.json --image-root images --records 100
  vllm-msd eval --target T --draft D --data held_out.jsonl --tree-depth 5 --tree-top-k 4 \\
      --num-speculative-tokens 24 --json figures.json
  what a draft vocabulary would cost in accepted tokens:
    vllm-msd eval --target T --draft D --data replies.jsonl --draft-vocab 8192 16384 32768
"""
_TRAINING_PACKAGES = ("accelerate", "matplotlib", "tensorboard", "yaml")


def _needs_training(command: Callable[[argparse.Namespace], int]) -> Any:
    """Say how to install what a command needs when it is missing."""

    @wraps(command)
    def run(args: argparse.Namespace) -> int:
        try:
            return command(args)
        except ModuleNotFoundError as error:
            name = (error.name or "").split(".")[0]
            if name not in _TRAINING_PACKAGES:
                raise
            raise ConfigError(TRAINING_MISSING.format(name=name)) from error

    return run


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add both commands."""
    train = subparsers.add_parser(
        "train",
        help="train a draft for a model of your own",
        description="Train an MSD draft for a frozen vision-language model: text conversations "
        "first, then more and more multimodal ones. Every flag is also a key of the YAML file, "
        "with underscores; a flag wins over the file, the file over the default.",
        epilog=_TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("--config", type=Path, metavar="YAML", help="settings in a file")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what the run would take: memory, steps, time, mix of data",
    )
    add_flags(train)
    train.set_defaults(func=run_train)

    evaluate = subparsers.add_parser(
        "eval",
        help="count how many drafted tokens a target accepts, without an engine",
        description="Let the target answer held-out conversations greedily and count how many "
        "tokens of the draft it would accept, as vLLM's metrics do: tokens per verification, "
        "share accepted at each depth, and the draft's accuracy there, by kind of data.",
        epilog=_EVAL_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("--target", required=True, help="folder or hub name")
    evaluate.add_argument("--draft", required=True, help="folder or hub name")
    evaluate.add_argument("--data", required=True, nargs="+", metavar="PATH", help="conversations")
    evaluate.add_argument("--image-root", nargs="+", default=[], metavar="PATH")
    evaluate.add_argument(
        "--records",
        type=positive,
        default=50,
        metavar="N",
        help="first ones of each kind (default: 50)",
    )
    evaluate.add_argument("--num-speculative-tokens", type=positive, default=5, metavar="N")
    evaluate.add_argument("--tree-depth", type=int, metavar="D", help="draft trees instead")
    evaluate.add_argument("--tree-top-k", type=int, metavar="K")
    evaluate.add_argument(
        "--max-tokens", type=positive, default=128, help="per reply (default: 128)"
    )
    evaluate.add_argument(
        "--max-length", type=positive, default=4096, help="of a prompt, in tokens"
    )
    evaluate.add_argument("--batch-size", type=positive, default=8)
    evaluate.add_argument(
        "--target-dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16")
    )
    evaluate.add_argument("--device", default="auto", choices=("auto", "cpu"))
    evaluate.add_argument(
        "--visual-rows",
        choices=VISUAL_ROWS,
        help="how the draft was trained (default: what its provenance.json says)",
    )
    evaluate.add_argument(
        "--draft-vocab",
        type=positive,
        nargs="+",
        default=[],
        metavar="SIZE",
        help="also try draft vocabularies of these sizes, chosen by the data's other records",
    )
    evaluate.add_argument(
        "--write",
        action="store_true",
        help="put the acceptance profile into the draft's config, where serving looks for it, and "
        "the figures into its model card",
    )
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    evaluate.set_defaults(func=run_eval)


@_needs_training
def run_train(args: argparse.Namespace) -> int:
    """Train, and say where the draft lies."""
    given = {k: v for k, v in vars(args).items() if k in TrainSettings.__dataclass_fields__}
    values = read_yaml(args.config) if args.config else {}
    settings = TrainSettings(**{**values, **given})
    if args.dry_run:
        return _dry_run(settings)
    from vllm_msd.training import engine

    outcome = engine.train(settings)
    output = Path(settings.output)
    if outcome["skipped"]:
        print(
            f"{outcome['skipped']} records were left out, listed in {output / 'skipped.jsonl'}",
            file=sys.stderr,
        )
    if outcome["steps"] < outcome["of"]:
        print(
            f"stopped at step {outcome['steps']} of {outcome['of']}; go on with --resume",
            file=sys.stderr,
        )
    print(json.dumps({"draft": str(output / "best"), **outcome}))
    return 0


def _dry_run(settings: TrainSettings) -> int:
    import torch

    from vllm_msd.training import dry_run

    found = dry_run.estimate(settings)
    is_gpu = settings.device == "auto" and torch.cuda.is_available()
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    speed = dry_run.matrix_speed(torch.device("cuda" if is_gpu else "cpu"), dtype)
    print(dry_run.describe(settings, found, speed))
    return 0


@_needs_training
def run_eval(args: argparse.Namespace) -> int:
    """Count, and print a table."""
    if args.json:
        check_file(args.json, "--json")
    from vllm_msd.training.evaluate import evaluate

    figures = evaluate(
        target=args.target,
        draft=args.draft,
        data=args.data,
        image_root=args.image_root,
        records=args.records,
        num_speculative_tokens=args.num_speculative_tokens,
        tree_depth=args.tree_depth,
        tree_top_k=args.tree_top_k,
        max_tokens=args.max_tokens,
        max_length=args.max_length,
        batch_size=args.batch_size,
        target_dtype=args.target_dtype,
        device=args.device,
        visual_rows=args.visual_rows,
        draft_vocab=args.draft_vocab,
        write=args.write,
    )
    print(_table(figures))
    if args.json:
        write_json(args.json.expanduser(), figures)
    return 0


def _table(figures: dict[str, Any]) -> str:
    rows = {**figures["kinds"], "all": figures["all"]}
    width = max(map(len, rows))
    lines = [f"{'kind':<{width}}  tokens per verification  accepted at depth 1, 2, ..."]
    for kind, row in rows.items():
        depths = " ".join(f"{share:.2f}" for share in row["accepted_at_depth"])
        lines.append(f"{kind:<{width}}  {row['acceptance_length']:<23.2f}  {depths}")
    if figures["draft_vocab"]:
        lines.append("draft vocabulary  tokens per verification  accepted tokens  of the replies")
    for row in figures["draft_vocab"]:
        kept = "-" if row["accepted"] is None else f"{row['accepted']:.1%}"
        length = f"{row['acceptance_length']:<23.2f}"
        lines.append(f"{row['size']:>16,}  {length}  {kept:<15}  {row['covers']:.1%}")
    if figures["skipped"]:
        lines.append(f"{len(figures['skipped'])} records left out:")
        lines += [f"  {reason}" for reason in figures["skipped"][:5]]
    return "\n".join(lines)
