"""`python -m vllm_msd.vllm_plugin.patches` prints the ledger as the table of docs/architecture.md;
`--check-source DIR` checks its records against an unpacked vLLM without importing it.
"""

import argparse
import sys
from pathlib import Path

from vllm_msd.vllm_plugin.patches.ledger import PATCHES, markdown_table
from vllm_msd.vllm_plugin.patches.patching import (
    PatchError,
    check_source,
    check_version,
    version_in_source,
)


def main(argv: list[str] | None = None) -> int:
    """Print the table, or check the records against unpacked sources (exit 1 on a mismatch)."""
    parser = argparse.ArgumentParser(prog="python -m vllm_msd.vllm_plugin.patches")
    parser.add_argument("--check-source", type=Path, metavar="DIR", help="folder holding vllm/")
    parser.add_argument("--version", help="vLLM version of DIR (default: read from its files)")
    args = parser.parse_args(argv)
    if args.check_source is None:
        print(markdown_table())
        return 0
    version = args.version or version_in_source(args.check_source)
    try:
        check_version(version)
    except PatchError as error:
        parser.error(str(error))
    problems = check_source(args.check_source, version, PATCHES)
    print("\n".join(problems) or f"{len(PATCHES)} patch points fit vLLM {version}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
