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
from typing import Any

from vllm_msd.errors import VLLM_MISSING, MSDError
from vllm_msd.storage import is_users_to_mend

COMMAND_MODULES = (
    "doctor",
    "env",
    "checkpoint_commands",
    "training_commands",
    "vocabulary_commands",
    "regenerate_command",
    "bench_command",
    "demo_commands",
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with every command."""
    parser = argparse.ArgumentParser(
        prog="vllm-msd",
        description="Multimodal Speculative Decoding (MSD) for vLLM.",
    )
    parser.add_argument(
        "--version", nargs=0, action=VersionAction, help="show the versions installed and exit"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMAND_MODULES:
        importlib.import_module(f"vllm_msd.cli.{name}").add_parsers(subparsers)
    completion = subparsers.add_parser(
        "completion",
        help="print a completion script for a shell",
        description='Completion in this shell: eval "$(vllm-msd completion bash)"',
    )
    completion.add_argument("shell", choices=("bash", "zsh"))
    completion.set_defaults(func=print_completion)
    return parser


class VersionAction(argparse.Action):
    """Prints this package's version with those of vLLM and torch, importing neither."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from vllm_msd.provenance import versions

        found = versions()
        print(", ".join(f"{name} {found[name]}" for name in ("vllm-msd", "vllm", "torch")))
        parser.exit()


def print_completion(args: argparse.Namespace) -> None:
    """Print the completion script of ``args.shell``, which shtab makes of the parser.

    Raises:
        MSDError: shtab is not installed.
    """
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise MSDError(
            "shtab is not installed, which makes the completion script. Install it together with "
            'this package: pip install "vllm-msd[completion]".'
        ) from error
    print(shtab.complete(build_parser(), shell=args.shell))


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
