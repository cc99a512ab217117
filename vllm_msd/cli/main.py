"""The ``vllm-msd`` command.

Command modules define ``add_parsers(subparsers)`` and give each parser a default ``func`` that
takes the parsed arguments and returns an exit code (``None`` counts as 0). They import torch,
transformers and vLLM inside that function only, so that ``vllm-msd --help`` answers at once.

Exit codes: 0 done, 1 the command found something wrong, 2 a mistake of the user's, told in a
sentence without a traceback.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from vllm_msd import __version__
from vllm_msd.errors import VLLM_MISSING, MSDError
from vllm_msd.storage import is_users_to_mend

COMMAND_MODULES = ("doctor", "checkpoint_commands", "training_commands", "demo_commands")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with every command."""
    parser = argparse.ArgumentParser(
        prog="vllm-msd",
        description="Multimodal Speculative Decoding (MSD) for vLLM.",
    )
    parser.add_argument("--version", action="version", version=f"vllm-msd {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMAND_MODULES:
        importlib.import_module(f"vllm_msd.cli.{name}").add_parsers(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.func(args) or 0
    except MSDError as error:
        return _user_error(str(error))
    except OSError as error:
        if not is_users_to_mend(error):
            raise
        return _user_error(f"{error.filename or 'writing'}: {error.strerror}. Give another place.")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        return _user_error(VLLM_MISSING)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _user_error(message: str) -> int:
    print(f"vllm-msd: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
