"""Show that the draft's visual branch matters: swap the image in the draft only.

    python benchmarks/visual_branch.py
    python benchmarks/visual_branch.py --output benchmarks/results/visual_branch.json

Every held-out image request is answered three times with MSD. The second time the draft, and only
the draft, is given the image embeddings of another request of the same kind, the third time noise
with the mean and spread of its own. Answers must not change. The swap costs what the draft had read
in this one picture, noise what its visual rows are worth at all.
"""

import argparse
import json
import sys
from pathlib import Path

from vllm_msd.errors import MSDError
from vllm_msd.measure.engine import Drafting, Engine, restart_tuned


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-prompts", type=int, default=60, help="the six kinds in turn")
    parser.add_argument("--num-speculative-tokens", type=int, default=5)
    parser.add_argument("--seed", type=int, default=40_000)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    restart_tuned()

    from vllm_msd.demo import paths
    from vllm_msd.measure import compare
    from vllm_msd.measure.image_swap import swap_images
    from vllm_msd.provenance import provenance

    facts = provenance(
        num_prompts=args.num_prompts,
        num_speculative_tokens=args.num_speculative_tokens,
        seed=args.seed,
        dtype="float32",
    )
    try:
        paths.use_factory()
        from demo_factory.world import IMAGE_KINDS, sample

        samples = [
            sample(IMAGE_KINDS[i % len(IMAGE_KINDS)], args.seed + i // len(IMAGE_KINDS), "test")
            for i in range(args.num_prompts)
        ]
        pair = paths.demo_pair()
        drafting = Drafting(args.num_speculative_tokens)
        engine = Engine(pair.target, draft=pair.draft, drafting=drafting)
        swaps = swap_images(engine, samples)
    except MSDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def figures(group: list) -> dict:
        return {
            "own_image": compare.acceptance(s.msd for s in group),
            "swapped_image": compare.acceptance(s.swapped for s in group),
            "noise": compare.acceptance(s.noise for s in group),
        }

    result = {
        **facts,
        "requests": len(swaps),
        "identical": sum(s.identical for s in swaps),
        "all": figures(swaps),
        "by_kind": {kind: figures(group) for kind, group in compare.by_kind(swaps).items()},
    }
    columns = ("own_image", "swapped_image", "noise")
    print(
        f"{'tokens per verification':<26}" + "".join(f"{c.replace('_', ' '):>16}" for c in columns)
    )
    for name, found in {**result["by_kind"], "all": result["all"]}.items():
        lengths = (found[column]["acceptance_length"] for column in columns)
        print(f"{name:<26}" + "".join(f"{length:>16.2f}" for length in lengths))
    print(f"answers unchanged: {result['identical']} of {result['requests']}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["identical"] == result["requests"] else 1


if __name__ == "__main__":
    sys.exit(main())
