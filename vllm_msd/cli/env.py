"""``vllm-msd env``: what a shell should export before vLLM starts on a CPU."""

import argparse
import os
import shlex

EXAMPLE = """\
examples:
  eval "$(vllm-msd env)"      set it in this shell, then: vllm serve ...
  vllm-msd env >> ~/.profile  or for good
"""


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add ``env`` to the ``vllm-msd`` command."""
    parser = subparsers.add_parser(
        "env",
        help="print exports that let vLLM use a CPU fully",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    """Print ``export NAME=VALUE`` lines; none where nothing is missing."""
    from vllm_msd.cpu_environment import tuned

    for name, value in tuned(os.environ).items():
        print(f"export {name}={shlex.quote(value)}")
