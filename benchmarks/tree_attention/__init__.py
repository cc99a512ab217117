"""The benchmark of tree attention: ``python -m benchmarks.tree_attention`` in the checkout's root.

The kernels need PyTorch and Triton only, so a GPU machine with these two can run it from a clone
that nobody installed. There, ``vllm_msd.kernels`` is not where Python looks for it.
"""

from importlib.util import find_spec
from pathlib import Path

import vllm_msd

if find_spec("vllm_msd.kernels") is None:
    # kernels/ is mapped to vllm_msd.kernels by setup.py; here it is one more place to look.
    vllm_msd.__path__.append(str(Path(vllm_msd.__file__).parents[1]))
