"""The long forms of the tests of faults: thousands of random inputs, and kills at random moments.

python -m tests.long.faults [--only PART ...] [--examples 2000] [--kills 30] [--seed 7]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.common import fuzz, kills
from tests.long.record import FAULTS, write_part


def main() -> int:
    """Run the parts one after the other, writing the file after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=[], metavar="PART")
    parser.add_argument("--out", type=Path, default=FAULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "fuzz-records": lambda: fuzz.records(folder, args.examples, args.seed),
            "fuzz-replies": lambda: fuzz.replies(args.examples, args.seed),
            "fuzz-data-files": lambda: fuzz.files(folder, args.examples, args.seed),
            "fuzz-pictures": lambda: fuzz.damaged_pictures(args.examples, args.seed),
            "fuzz-drafts": lambda: fuzz.drafts(args.examples, args.seed),
            "kill-train": lambda: kills.killed("train", args.kills, args.seed),
            "kill-convert": lambda: kills.killed("convert", args.kills, args.seed),
            "kill-regenerate": lambda: kills.killed("regenerate", args.kills, args.seed),
            "kill-trim": lambda: kills.killed("trim", args.kills, args.seed),
        }
        for part in args.only or parts:
            started = time.monotonic()
            found = parts[part]()
            size = {"kills": args.kills} if "kill" in part else {"examples": args.examples}
            figures = {"seconds": round(time.monotonic() - started), "found": found}
            write_part(args.out, part, figures, seed=args.seed, **size)
            print(part, figures, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
