"""Checks that vLLM still has the methods which our subclasses of its classes replace.

A method renamed in vLLM would silently not be replaced any more: output stays right in some of
these cases and nobody would notice.
"""

import inspect

from vllm_msd.vllm_plugin.patches.patching import SUPPORTED_RANGE, PatchError, vllm_version

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_overrides(cls: type) -> None:
    """Compare each method marked with `typing_extensions.override` with vLLM's that it replaces.

    Classes of ours in between are passed over where they are marked, too. Parameter names must be
    the same; a method that ends in ``*args, **kwargs`` has to name the first ones only.

    Raises:
        PatchError: vLLM has no such method, or it takes other parameters.
    """
    for name, method in vars(cls).items():
        if not getattr(method, "__override__", False):
            continue
        bases = (vars(base)[name] for base in cls.__mro__[1:] if name in vars(base))
        replaced = next((m for m in bases if not getattr(m, "__override__", False)), None)
        where = f"{cls.__mro__[1].__name__}.{name}"
        if replaced is None:
            raise PatchError(_message(f"{where} is missing"))
        ours, theirs = _parameters(method), list(inspect.signature(replaced).parameters)
        open_ended = len(ours) < len(inspect.signature(method).parameters)
        if ours != (theirs[: len(ours)] if open_ended else theirs):
            raise PatchError(_message(f"{where} takes {theirs}, expected {ours}"))


def _parameters(method: object) -> list[str]:
    parameters = inspect.signature(method).parameters.values()
    return [p.name for p in parameters if p.kind not in _VARIABLE]


def _message(problem: str) -> str:
    return (
        f"vllm-msd's draft trees do not fit vLLM {vllm_version()}: {problem}. Supported: vLLM "
        f"{SUPPORTED_RANGE}. Leave tree_depth and tree_top_k out to draft chains."
    )
