"""Lets vLLM's Model Runner V2 run on a CPU: its Triton kernels go through Triton's interpreter.

vLLM uses V2 wherever Triton has a backend for the platform; the stock Triton wheel has none for
CPUs. This package pretends to be one. Put its parent folder on PYTHONPATH and set
TRITON_INTERPRET=1 in the process that shall run V2: no kernel is ever compiled, so the backend's
methods are never called.
"""

import functools


def repair_masks() -> None:
    """Entry point of vLLM's general plugins: mend boolean masks in the interpreter.

    Triton 3.9.0 broadcasts a scalar condition to an int32 array, and its masked loads and stores
    accept booleans only.
    """
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
