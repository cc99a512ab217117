"""Measure draft trees against chains in vLLM: acceptance, speed at real cost, and where time goes.

    python benchmarks/bench_trees.py --output benchmarks/results/trees.json
    python benchmarks/bench_trees.py --parts acceptance --chains 5 --trees 24x5x5 16x6x3
    python benchmarks/bench_trees.py --parts speed profile --size 350M --speed-trees 7x4x2

A tree is written NODESxDEPTHxTOP_K, a chain by its length. Everything is greedy, at batch 1, and
against no speculation, all engines in one process and in turn:

acceptance  the small pair in fp32: tokens per verification, by kind of work and by depth; the
            answers must be those of no speculation
speed       the pair widened to --size parameters: decoding speed. bf16 where the processor computes
            in it, else fp32: emulated bf16 costs every row as much as the first
products    the same pair's matrix products alone, by the rows in a pass, and what a verification
            with each drafting of `speed` needs of them: what no drafting can go below
profile     the same pair with the first of --speed-trees: mean time of a verification by part;
            the draft's own matrix products are taken off drafting (Model Runner V1, on a CPU)

On a CPU the engines of `speed` share the target's weights; starting one needs room for them twice.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vllm_msd.errors import MSDError
from vllm_msd.measure.engine import Drafting, restart_tuned, timed_dtype
from vllm_msd.measure.inputs import Sample

PARTS = ("acceptance", "speed", "products", "profile")
ROWS = (1, 2, 4, 6, 8, 12, 16, 24)


def tree(text: str) -> Drafting:
    """``16x6x3`` to a `Drafting`."""
    try:
        nodes, depth, top_k = (int(number) for number in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NODESxDEPTHxTOP_K") from None
    return Drafting(nodes, depth, top_k)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--chains", nargs="+", type=int, default=[5, 7], help="for acceptance")
    parser.add_argument("--trees", nargs="+", type=tree, help="for acceptance (24x5x5 16x6x3)")
    parser.add_argument("--speed-chains", nargs="+", type=int, default=[3, 5, 7])
    parser.add_argument("--speed-trees", nargs="+", type=tree, help="(11x6x2 16x6x3)")
    parser.add_argument("--num-prompts", type=int, default=42, help="the seven kinds in turn")
    parser.add_argument("--num-wide-prompts", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3, help="of the speed part")
    parser.add_argument("--size", default="1B", help="parameters of the widened pair")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--seed", type=int, default=50_000)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    args.trees = args.trees or [Drafting(24, 5, 5), Drafting(16, 6, 3)]
    args.speed_trees = args.speed_trees or [Drafting(11, 6, 2), Drafting(16, 6, 3)]
    restart_tuned()

    from vllm_msd.provenance import provenance

    if args.dtype == "auto":
        args.dtype = timed_dtype()
        print(f"speed and profile in {args.dtype}", flush=True)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    settings |= {key: [str(t) for t in settings[key]] for key in ("trees", "speed_trees")}
    result: dict[str, Any] = provenance(**settings)
    try:
        for part in PARTS:
            if part in args.parts:
                print(f"{part}:", flush=True)
                result[part] = globals()[part](args)
                if args.output:  # a long run keeps what it has
                    args.output.parent.mkdir(parents=True, exist_ok=True)
                    args.output.write_text(json.dumps(result, indent=1) + "\n")
    except MSDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = result.get("acceptance", {}).values()
    return 0 if all(one["identical"] == one["requests"] for one in found) else 1


def _timed(args: argparse.Namespace) -> dict[str, Drafting]:
    """The draftings of the speed part, by name."""
    return {str(d): d for d in [*map(Drafting, args.speed_chains), *args.speed_trees]}


def _samples(count: int, seed: int) -> list[Sample]:
    """More held-out samples than come with the package."""
    from vllm_msd.demo import paths

    paths.use_factory()
    from demo_factory.held_out import held_out_samples

    return held_out_samples(count, seed)


def _dot(_: Any) -> None:
    print(".", end="", flush=True)


def acceptance(args: argparse.Namespace) -> dict[str, Any]:
    """`compare.figures` of the small pair without the speeds, by drafting."""
    from vllm_msd.demo import paths
    from vllm_msd.measure.compare import compare, figures

    draftings = {str(d): d for d in [*map(Drafting, args.chains), *args.trees]}
    samples = _samples(args.num_prompts, args.seed)
    comparisons = compare(
        paths.demo_pair(),
        samples,
        draftings,
        dtype="float32",
        max_tokens=args.max_tokens,
        on_answer=_dot,
    )
    print()
    result = {}
    for name in draftings:
        found = figures(comparisons, name)
        result[name] = {key: value for key, value in found.items() if not key.startswith("speed")}
        print(
            f"  {name:<36}{found['all']['acceptance_length']:.2f} tokens per verification; "
            f"{found['identical']} of {found['requests']} identical"
        )
    return result


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Speeds of the widened pair by drafting, with the acceptance that goes with them."""
    import gc

    import torch

    from vllm_msd.demo import paths
    from vllm_msd.measure.compare import PLAIN, compare, figures, rates

    pair = paths.wide_pair(args.size, dtype=args.dtype, report=print)
    draftings = _timed(args)
    comparisons = compare(
        pair,
        _samples(args.num_wide_prompts, args.seed),
        draftings,
        dtype=args.dtype,
        max_tokens=args.max_tokens,
        rounds=args.rounds,
        on_answer=_dot,
        share_weights=not torch.cuda.is_available(),
    )
    gc.collect()  # the engines, before `profile` starts one
    print()
    found = {name: figures(comparisons, name) for name in draftings}
    plain = next(iter(found.values()))["speed"]["plain_tokens_per_second"]
    for name, one in found.items():
        one = one["speed"]
        print(
            f"  {name:<36}{one['msd_tokens_per_second']:.1f} tokens/s, {one['speedup']:.2f}x no "
            "speculation"
        )
    print(f"  {'no speculation':<36}{plain:.1f} tokens/s")
    return {
        "plain_tokens_per_second": plain,
        "plain_tokens_per_second_per_round": rates(comparisons, PLAIN),
        "draftings": {
            name: {
                **one["speed"],
                "acceptance_length": one["all"]["acceptance_length"],
                "identical": one["identical"],
                "requests": one["requests"],
                "tokens_per_second_per_round": rates(comparisons, name),
            }
            for name, one in found.items()
        },
    }


def products(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the matrix products by rows and model, and in a verification by drafting.

    A drafting's products are one pass of the target over its tokens and the root, and a pass of the
    draft for each of its depths, over a level's rows.
    """
    from vllm_msd.demo import paths
    from vllm_msd.measure.step_profile import products_by_rows

    pair = paths.wide_pair(args.size, dtype=args.dtype, report=print)
    draftings, counts = _timed(args), {*ROWS}
    for d in draftings.values():
        counts |= {d.num_tokens + 1, d.top_k or 1}
    found = products_by_rows(pair, sorted(counts), dtype=args.dtype)
    by_rows = {name: one["milliseconds"] for name, one in found.items()}
    target, draft = by_rows["target"], by_rows["draft"]
    needed = {
        name: target[d.num_tokens + 1] + d.deepest * draft[d.top_k or 1]
        for name, d in draftings.items()
    }
    for rows in ROWS:
        print(f"  {rows:>2} rows: target {target[rows]:.1f} ms, draft {draft[rows]:.1f} ms")
    for name, milliseconds in needed.items():
        print(f"  {name:<36}{milliseconds:.1f} ms per verification")
    return {
        "matrices": {name: one["matrices"] for name, one in found.items()},
        "milliseconds_by_rows": by_rows,
        "milliseconds_per_verification": {"no speculation": target[1], **needed},
    }


def profile(args: argparse.Namespace) -> dict[str, Any]:
    """Shares of a step's time under `step_profile`, of a tree of the speed part."""
    from vllm_msd.demo import paths
    from vllm_msd.measure.step_profile import profile_steps

    pair = paths.wide_pair(args.size, dtype=args.dtype, report=print)
    found = profile_steps(
        pair,
        args.speed_trees[0],
        _samples(args.num_wide_prompts, args.seed),
        dtype=args.dtype,
        max_tokens=args.max_tokens,
    )
    for name, milliseconds in found["milliseconds_per_step"].items():
        print(f"  {name:<40}{milliseconds:8.2f} ms")
    share = found["drafting_and_settling_share"]
    print(f"  drafting and settling outside the draft's matrix products: {share:.1%}")
    return {"drafting": str(args.speed_trees[0]), **found}


if __name__ == "__main__":
    sys.exit(main())
