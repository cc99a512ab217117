"""Checks that vLLM still has the methods which our subclasses of its classes replace.

A method renamed in vLLM would silently not be replaced any more: output stays right in some of
these cases and nobody would notice.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from vllm_msd.vllm_plugin.patches.patching import SUPPORTED_RANGE, PatchError, vllm_version

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_overrides(cls: type) -> None:
    """Compare each method marked with `typing_extensions.override` with vLLM's that it replaces.

    Classes of ours in between are passed over where they are marked, too. Parameter names must be
    the same; a method that ends in ``*args, **kwargs`` has to name the first ones only, and further
    ones of ours need a default. Methods of bases of ours are compared as well, as a class mixed in
    before vLLM's has nothing to replace by itself.

    Raises:
        PatchError: vLLM has no such method, or it takes other parameters.
    """
    mro = cls.__mro__
    for place, owner in enumerate(mro):
        if owner is cls or owner.__module__.startswith("vllm_msd."):
            for name, method in vars(owner).items():
                if getattr(method, "__override__", False):
                    _check(name, method, mro[place + 1 :])


def _check(name: str, method: Callable[..., Any], bases: Sequence[type]) -> None:
    those = (vars(base)[name] for base in bases if name in vars(base))
    replaced = next(
        (method for method in those if not getattr(method, "__override__", False)), None
    )
    where = f"{bases[0].__name__}.{name}"
    if replaced is None:
        raise PatchError(_message(f"{where} is missing"))
    theirs = list(inspect.signature(replaced).parameters)
    ours = _parameters(method, len(theirs))
    open_ended = any(p.kind in _VARIABLE for p in inspect.signature(method).parameters.values())
    if ours != (theirs[: len(ours)] if open_ended else theirs):
        raise PatchError(_message(f"{where} takes {theirs}, expected {ours}"))


def _parameters(method: Callable[..., Any], expected: int) -> list[str]:
    """Names of a method's parameters; beyond the expected number, of those without a default."""
    parameters = inspect.signature(method).parameters.values()
    named = [p for p in parameters if p.kind not in _VARIABLE]
    more = [p for p in named[expected:] if p.default is inspect.Parameter.empty]
    return [p.name for p in named[:expected] + more]


def _message(problem: str) -> str:
    return (
        f"vllm-msd's draft trees do not fit vLLM {vllm_version()}: {problem}. Supported: vLLM "
        f"{SUPPORTED_RANGE}. Leave tree_depth and tree_top_k out to draft chains."
    )
