"""Run a test file in Triton's interpreter, and make that compute what a GPU would.

For tests only. Each mended entry can go once the interpreter does it: bfloat16 is stored as raw
16-bit integers and multiplied as such by dot, and rounded towards zero when made from float32; the
splat of a boolean scalar becomes an integer mask that loads and stores refuse.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_again_interpreted(file: str) -> None:
    """The tests of this file in a process of its own that has the interpreter on.

    It must be on before Triton is imported.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


def mend_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch the interpreter for the lifetime of ``monkeypatch``."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot
    truncate = InterpreterBuilder.create_fp_trunc
    load = InterpreterBuilder.create_masked_load
    store = InterpreterBuilder.create_masked_store

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def create_fp_trunc(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return truncate(self, src, dst_type)

    def as_bool(mask):
        if mask is None or mask.data.dtype == np.bool_:
            return mask
        return TensorHandle(mask.data.astype(np.bool_), tl.int1)

    def create_masked_load(self, ptrs, mask, other, *rest):
        return load(self, ptrs, as_bool(mask), other, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        return store(self, ptrs, value, as_bool(mask), *rest)

    for replacement in (create_dot, create_fp_trunc, create_masked_load, create_masked_store):
        monkeypatch.setattr(InterpreterBuilder, replacement.__name__, replacement)
