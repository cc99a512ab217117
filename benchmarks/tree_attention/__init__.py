"""Import this first: it finds ``vllm_msd.kernels`` in a clone that nobody installed.

The kernels need PyTorch and Triton only, so a GPU machine with these two can run the benchmarks as
they are. An installed package is taken where there is one.
"""

import sys
from pathlib import Path

try:
    import vllm_msd.kernels
except ModuleNotFoundError:
    root = str(Path(__file__).resolve().parents[1])
    sys.path.insert(0, root)
    import vllm_msd

    # kernels/ is mapped to vllm_msd.kernels by setup.py; here it is one more place to look.
    vllm_msd.__path__.append(root)
