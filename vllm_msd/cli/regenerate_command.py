"""``vllm-msd regenerate``."""

import argparse
import json
import sys
from dataclasses import asdict

from vllm_msd.cli.arguments import positive

_EXAMPLES = """examples:
  from a server, which may be stopped and started again meanwhile:
    vllm serve llava-hf/llava-1.5-7b-hf --port 8000
    vllm-msd regenerate --data llava_v1_5_mix665k.json --image-root images \\
        --output own.json --server http://localhost:8000

  without one, two replies to each question, drawn at the temperature of serving:
    vllm-msd regenerate --data sharegpt.jsonl --output own.jsonl \\
        --target Qwen/Qwen2.5-VL-7B-Instruct --engine-args="--tensor-parallel-size 2" \\
        --samples 2 --temperature 0.7 --top-p 0.9

  going on after a kill: the same command again
"""


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "regenerate",
        help="give training data replies of the target's own",
        description="Replace the replies of conversations by the target's own, turn by turn, with "
        "their images: what a draft should learn to guess. Records may come without replies. "
        "Order, ids and all other fields stay. What failed is listed beside the output, with the "
        "reason. After a kill the same command goes on where it was.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="PATH", help="conversations")
    parser.add_argument(
        "--output", required=True, metavar="PATH", help="a JSON list, or JSONL if it ends in .jsonl"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--server",
        metavar="URL",
        help="an OpenAI-compatible one that serves the target (its key: OPENAI_API_KEY)",
    )
    source.add_argument(
        "--target", metavar="T", help="folder or hub name, served in this process by vLLM"
    )
    parser.add_argument("--model", help="its name at the server (default: the first listed)")
    parser.add_argument(
        "--engine-args",
        default="",
        metavar="ARGS",
        help="with --target: options of `vllm serve`, in one string after a '='",
    )
    parser.add_argument(
        "--image-root",
        nargs="+",
        default=[],
        metavar="PATH",
        help="folders of relative image paths (default: that of --data)",
    )
    parser.add_argument(
        "--samples", type=positive, default=1, metavar="N", help="of each record (default: 1)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1")
    parser.add_argument(
        "--max-tokens", type=positive, default=512, metavar="N", help="of a reply (default: 512)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument(
        "--concurrency",
        type=positive,
        default=32,
        metavar="N",
        help="conversations at a time (default: 32)",
    )
    parser.add_argument(
        "--retries",
        type=positive,
        default=6,
        metavar="N",
        help="after an attempt that failed for the server's reasons (default: 6)",
    )
    parser.add_argument(
        "--timeout", type=positive, default=600, metavar="S", help="of a reply (default: 600 s)"
    )
    parser.add_argument(
        "--wait",
        type=positive,
        default=600,
        metavar="S",
        help="for a server that is away, before giving up (default: 600 s)",
    )
    parser.add_argument(
        "--stop-after-minutes",
        type=float,
        default=0.0,
        metavar="M",
        help="begin no more conversations after this time and write what is there; the same "
        "command goes on (default: 0, ask for all)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="write over an output that is there, or forget a killed run with other settings",
    )
    parser.set_defaults(func=run_regenerate)


def run_regenerate(args: argparse.Namespace) -> int:
    """Regenerate, and say what came of it; 1 where the same command can make more of it."""
    from vllm_msd.regenerate import RegenerateSettings, regenerate
    from vllm_msd.regenerate.run import failures_of

    names = RegenerateSettings.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names}
    counts = regenerate(RegenerateSettings(**given))
    if counts.cut_replies:
        print(
            f"{counts.cut_replies} replies were cut at --max-tokens ({args.max_tokens})",
            file=sys.stderr,
        )
    failures = failures_of(args.output)
    if failures.is_file():
        print(f"what is not in the output, or only in part: {failures}", file=sys.stderr)
    if counts.not_asked:
        print(
            f"{counts.not_asked} conversations were not asked for in this time; the same command "
            "goes on with them.",
            file=sys.stderr,
        )
    if counts.unanswered:
        print(
            f"{counts.unanswered} conversations got no answer; the same command asks for them "
            f"again. If this is enough, delete {args.output}.journal.",
            file=sys.stderr,
        )
    print(json.dumps({"output": str(args.output), **asdict(counts)}))
    return 1 if counts.unfinished else 0
