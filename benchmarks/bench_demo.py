"""Measure the demo pair in vLLM with and without MSD: acceptance by kind, and speed at real cost.

    python benchmarks/bench_demo.py --output benchmarks/results/demo.json

Two interleaved comparisons at batch 1, greedy: the small pair in fp32 (answers must be identical;
acceptance), and the pair widened to --wide parameters in bf16 (decoding speed; in fp32 where the
processor does not compute in bf16). The same code as
`vllm-msd demo run`, with more requests.
"""

import argparse
import json
import sys
from pathlib import Path

from vllm_msd.errors import MSDError
from vllm_msd.measure.engine import Drafting, restart_tuned, timed_dtype


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-prompts", type=int, default=105, help="the seven kinds in turn")
    parser.add_argument("--num-wide-prompts", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=3, help="of the widened pair")
    parser.add_argument("--wide", default="350M", help="size of the widened pair, or 'none'")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="both engines with torch.compile (needs a C++ compiler)",
    )
    parser.add_argument("--num-speculative-tokens", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--seed", type=int, default=50_000)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    restart_tuned()

    from vllm_msd.demo import paths
    from vllm_msd.measure.compare import compare, figures
    from vllm_msd.provenance import provenance

    dtype = timed_dtype()
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    settings["wide_dtype"] = dtype
    result = provenance(**settings)
    draftings = {"chain": Drafting(args.num_speculative_tokens)}
    common = {
        "max_tokens": args.max_tokens,
        "enforce_eager": not args.compile,
        "on_answer": lambda comparison: print(".", end="", flush=True),
    }
    try:
        paths.use_factory()
        from demo_factory.held_out import held_out_samples

        samples = held_out_samples(args.num_prompts, args.seed)
        small = compare(paths.demo_pair(), samples, draftings, dtype="float32", **common)
        result["small"] = figures(small, "chain")
        result["wide"] = None
        if args.wide != "none":
            pair = paths.wide_pair(args.wide, dtype=dtype, report=print)
            wide = samples[: args.num_wide_prompts]
            found = compare(pair, wide, draftings, dtype=dtype, rounds=args.rounds, **common)
            result["wide"] = figures(found, "chain")
    except MSDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print()
    for name in ("small", "wide"):
        if found := result.get(name):
            speed = found["speed"]
            print(
                f"{name}: {found['identical']} of {found['requests']} identical; "
                f"{found['multimodal']['acceptance_length']:.2f} tokens per verification with "
                f"images, {found['all']['acceptance_length']:.2f} over all; "
                f"{speed['plain_tokens_per_second']:.1f} -> {speed['msd_tokens_per_second']:.1f} "
                f"tokens/s ({speed['speedup']:.2f}x)"
            )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    small = result["small"]
    return 0 if small["identical"] == small["requests"] else 1


if __name__ == "__main__":
    sys.exit(main())
