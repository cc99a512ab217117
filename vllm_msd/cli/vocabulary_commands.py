"""``vllm-msd trim``."""

import argparse
import sys
from typing import Any

from vllm_msd.cli.arguments import positive
from vllm_msd.cli.checkpoint_commands import recorded_target
from vllm_msd.errors import CheckpointError

_EXAMPLES = """examples:
  as many tokens as 98 % of the replies are made of, for a published draft:
    vllm-msd trim Cloudriver/MSD-Qwen2.5-VL-7B-Instruct --data replies.jsonl \\
        --output drafts/qwen-trimmed

  a fixed size; the counts of an earlier call in the folder are used again:
    vllm-msd trim drafts/mine --data replies.jsonl --size 32768 --output drafts/mine-32k
"""


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add the command."""
    trim = subparsers.add_parser(
        "trim",
        help="let a draft propose frequent tokens alone, without training",
        description="Count the tokens of replies, as the target's tokenizer writes them, and write "
        "a copy of the draft that proposes the most frequent ones and all special ones. Its head "
        "becomes that much smaller in serving; what it cannot propose, the target says by itself. "
        "A call that was killed goes on when it is made again.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    trim.add_argument("draft", metavar="DRAFT", help="folder or hub name")
    trim.add_argument(
        "--data", required=True, nargs="+", metavar="PATH",
        help="conversations, best with replies of the target's own; every tenth record is held out",
    )  # fmt: skip
    trim.add_argument("--output", required=True, metavar="D2", help="folder for the new draft")
    trim.add_argument(
        "--target", metavar="T", help="folder or hub name (default: what the draft was trained for)"
    )
    amount = trim.add_mutually_exclusive_group()
    amount.add_argument("--size", type=positive, metavar="N", help="tokens to keep")
    amount.add_argument(
        "--coverage", type=_share, default=0.98, metavar="C",
        help="keep as many as cover this share of the tokens held out (default: 0.98)",
    )  # fmt: skip
    trim.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    trim.set_defaults(func=_trim)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0, at most 1")
    return share


def _trim(args: argparse.Namespace) -> int:
    from vllm_msd.training.trim import trim

    target = args.target or recorded_target(args.draft)
    if target is None:
        raise CheckpointError(
            f"{args.draft}: it does not say which target it is for. Give --target."
        )
    figures = trim(args.draft, args.data, args.output, target, args.size, args.coverage, args.force)
    if figures["skipped"]:
        print(f"{len(figures['skipped'])} records left out:", file=sys.stderr)
        print("\n".join(f"  {reason}" for reason in figures["skipped"][:5]), file=sys.stderr)
    print(_table(figures))
    print(f"wrote {args.output}")
    return 0


def _table(figures: dict[str, Any]) -> str:
    shown = {**figures["by_size"], figures["size"]: figures["covers_held_out"]}
    lines = ["tokens kept  of the replies held out"]
    for size, share in sorted(shown.items()):
        mark = "  <- kept" if size == figures["size"] else ""
        lines.append(f"{size:>11,}  {share:.2%}{mark}")
    lines.append(
        f"kept {figures['size']:,} of {figures['vocab_size']:,} tokens, by "
        f"{figures['tokens']:,} in {figures['records']:,} records"
    )
    return "\n".join(lines)
