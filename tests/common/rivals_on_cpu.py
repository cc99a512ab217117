"""Call the tree attention of xformers or mslk as the benchmark does, in Triton's interpreter.

    python -m tests.common.rivals_on_cpu xformers

Both refuse CPU tensors only because nobody compiled for them; what is lifted here are their checks
of the device. Prints the worst error as a multiple of what rounding explains, once per case.
"""

import importlib
import os
import sys

os.environ |= {"TRITON_INTERPRET": "1", "MSLK_PYTHON_ONLY": "1"}  # no native library without CUDA

import torch

from benchmarks.tree_attention.problem import TINY, Case, Problem
from benchmarks.tree_attention.rivals import RIVALS

SPLIT_K = {
    "xformers": "xformers.ops.fmha.triton_splitk",
    "mslk": "mslk.attention.fmha.triton_splitk",
}


def main(package: str) -> None:
    torch.version.cuda = "12.8"
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    split_k = importlib.import_module(SPLIT_K[package])
    split_k.FwOp.SUPPORTED_DEVICES.add("cpu")
    merge = split_k.merge_attentions_varargs
    merge.register_kernel("cpu")(merge._init_fn)
    for context, nodes in ((100, 12), (20, 1)):
        problem = Problem.make(Case(TINY, 2, context, nodes), "cpu", torch.float16, max_copies=2)
        calls = RIVALS[f"{package}, dense"].make(problem)
        print(problem.worst_error(calls[0]()))


if __name__ == "__main__":
    main(sys.argv[1])
