"""Make the widened demo pair: the same functions at a larger model's cost.

    python benchmarks/widen.py 350M
    python benchmarks/widen.py 1B --dtype float32 --seed 3

Prints where target and draft lie, as JSON. The logic is in vllm_msd/demo/widen.py.
"""

import argparse
import json
import sys

from vllm_msd.demo import paths
from vllm_msd.errors import MSDError


def main() -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("size", nargs="?", default="350M", help="parameters (default: %(default)s)")
    parser.add_argument("--dtype", choices=paths.DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=paths.SEED, help="of the added random weights")
    args = parser.parse_args()
    try:
        pair = paths.wide_pair(args.size, dtype=args.dtype, seed=args.seed, report=_to_stderr)
    except MSDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(pair.as_dict()))
    return 0


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
