"""What is left of the plugin where MSD does not fit: vLLM runs as if it were not installed.

A request for MSD alone is met, with an error that names the supported versions; vLLM by itself
would say that it knows no method `msd`, which is no help to somebody who has installed it. The two
hooks for this are no patches of the ledger: they know nothing of vLLM but two names, hand every
argument through, and where a name is gone its hook is left out.
"""

import argparse
import functools
import logging
import multiprocessing
from collections.abc import Callable, Mapping
from typing import Any

from vllm_msd.vllm_plugin import METHOD
from vllm_msd.vllm_plugin.configuration import resolve
from vllm_msd.vllm_plugin.patches.patching import PatchError, replace_attribute, setup_failed

# Below vLLM's own logger, whose handlers then print it in every version.
_logger = logging.getLogger("vllm.vllm_msd")
_reason: PatchError | None = None


def reason() -> PatchError | None:
    """Why MSD is off in this process, None where it is not."""
    return _reason


def stand_by(error: Exception) -> None:
    """Warn that MSD is off, once, and make a request for it raise; a second call changes nothing.

    Args:
        error: what the registration ended with.
    """
    global _reason
    if _reason is not None:
        return
    _reason = error if isinstance(error, PatchError) else setup_failed(error)
    # vLLM's engine core and workers are children of the process that has warned already.
    is_child = multiprocessing.parent_process() is not None
    _logger.log(logging.DEBUG if is_child else logging.WARNING, "MSD is off: %s", _reason)
    try:
        from vllm.engine.arg_utils import EngineArgs
    except ImportError:
        return
    for name, wrap in (
        ("create_speculative_config", _refusing_config),
        ("add_cli_args", _refusing_flags),
    ):
        if name in vars(EngineArgs):
            replace_attribute(EngineArgs, name, wrap)


def _refusing_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_speculative_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if asks_for_msd(self):
            raise PatchError(str(_reason)) from _reason.__cause__
        return original(self, *args, **kwargs)

    return create_speculative_config


def asks_for_msd(engine_args: Any) -> bool:
    """Whether these are arguments of an engine with MSD, whichever of them are known."""
    config = getattr(engine_args, "speculative_config", None)
    config = config if isinstance(config, Mapping) else {}
    method = getattr(engine_args, "spec_method", None) or config.get("method")
    model = getattr(engine_args, "spec_model", None) or config.get("model")
    if method is None and isinstance(model, str):
        return resolve.is_msd_draft(model)
    return METHOD in (method, model)


def _refusing_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    """The command line ends at a request for MSD as at any wrong argument, without a traceback."""

    @functools.wraps(original)
    def add_cli_args(*args: Any, **kwargs: Any) -> Any:
        parser = original(*args, **kwargs)
        if isinstance(parser, argparse.ArgumentParser):
            flags = parser._option_string_actions
            if "--speculative-model" not in flags:
                parser.add_argument("--speculative-model", type=_refuse, help=argparse.SUPPRESS)
            for flag in ("--spec-method", "--spec-model"):
                if flag in flags:
                    flags[flag].type = _unless_msd(flags[flag].type or str)
        return parser

    return add_cli_args


def _unless_msd(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(convert)
    def checked(value: str) -> Any:
        return _refuse(value) if value == METHOD else convert(value)

    return checked


def _refuse(value: str) -> Any:
    raise argparse.ArgumentTypeError(str(_reason))
