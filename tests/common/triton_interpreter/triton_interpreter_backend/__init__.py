"""Lets vLLM's Model Runner V2 run on a CPU: its Triton kernels go through Triton's interpreter.

vLLM uses V2 wherever Triton has a backend for the platform; the stock Triton wheel has none for
CPUs. This package pretends to be one. Put its parent folder on PYTHONPATH and set
TRITON_INTERPRET=1 in the process that shall run V2: no kernel is ever compiled, so the backend's
methods are never called.
"""

import functools


def repair() -> None:
    """Entry point of vLLM's general plugins: mend what Triton 3.9.0's interpreter gets wrong."""
    _repair_masks()
    _repair_ranges()


def _repair_masks() -> None:
    """A scalar condition is broadcast to an int32 array; masked loads and stores want booleans."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def with_boolean_mask(method, position):
        @functools.wraps(method)
        def call(self, *args, **kwargs):
            args = list(args)
            mask = args[position]
            if mask is not None and mask.data.dtype != np.bool_:
                args[position] = TensorHandle(mask.data != 0, tl.int1)
            return method(self, *args, **kwargs)

        call.accepts_integers = True
        return call

    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        method = getattr(InterpreterBuilder, name)
        if not hasattr(method, "accepts_integers"):
            setattr(InterpreterBuilder, name, with_boolean_mask(method, position))


def _repair_ranges() -> None:
    """`tl.range` yields Python integers, which have none of a scalar's methods (`.to`)."""
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter._patch_lang, "yields_scalars"):
        return
    patch_lang = interpreter._patch_lang

    def scalars(numbers):
        return lambda *args, **kwargs: map(interpreter._implicit_cvt, numbers(*args, **kwargs))

    @functools.wraps(patch_lang)
    def patch_lang_and_ranges(fn):
        scope = patch_lang(fn)
        for lang in (tl, tl.core):
            if not isinstance(lang.range, type):  # the interpreter has replaced the class
                scope.set_attr(lang, "range", scalars(lang.range))
        return scope

    patch_lang_and_ranges.yields_scalars = True
    interpreter._patch_lang = patch_lang_and_ranges
