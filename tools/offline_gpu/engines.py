"""What smoke.py and bench_gpu.py share: the rooms they use, and the options of vLLM's engines."""

import os
from pathlib import Path
from typing import Any

import torch

from vllm_msd.demo.paths import demo_pair, wide_pair
from vllm_msd.demo.samples import held_out_samples
from vllm_msd.measure.compare import acceptance
from vllm_msd.measure.engine import Drafting, Engine

__all__ = ["Drafting", "Engine", "acceptance", "demo_pair", "held_out_samples", "options",
           "wide_pair", "write"]  # fmt: skip

MODES = ("eager", "graphs", "compiled")
# Without torch.compile: the machine's torch is older than the one vLLM 0.33 is written for.
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
COMPILED = {"cudagraph_mode": "FULL_AND_PIECEWISE"}  # vLLM's default, with Inductor
GPU_ONLY = {
    "mm_encoder_attn_backend": "TORCH_SDPA",
    "kernel_config": {"enable_cutedsl_warmup": False, "enable_flashinfer_autotune": False},
}


def options(
    mode: str,
    *,
    requests: int = 2,
    rows: int = 1,
    gib: float = 0.25,
    backend: str = "TRITON_ATTN",
) -> dict[str, Any]:
    """vLLM's engine arguments; several such engines fit on one GPU.

    Args:
        mode: one of `MODES`.
        requests: that decode at once at most; so many are captured.
        rows: of a request in a step, drafts and the root: ``num_speculative_tokens + 1``.
        gib: of KV cache.
        backend: of attention. Ignored without a GPU, where these options are for rehearsals.
    """
    found: dict[str, Any] = {
        "max_num_seqs": requests,
        "kv_cache_memory_bytes": int(gib * 2**30),
        "gpu_memory_utilization": 0.2,
        "enforce_eager": mode == "eager",
    }
    compilation: dict[str, Any] = {}
    if mode == "graphs":
        # vLLM's own sizes end at 512 rows, which is 20 requests with trees of 24 nodes.
        counts = [n for n in (1, 2, 4, *range(8, requests, 8)) if n < requests] + [requests]
        compilation = GRAPHS | {"cudagraph_capture_sizes": [n * rows for n in counts]}
    elif mode == "compiled":
        compilation = dict(COMPILED)
    if torch.cuda.is_available():
        found |= {"attention_backend": backend, **GPU_ONLY}
    if os.environ.get("KIT_NO_C") == "1":
        compilation["custom_ops"] = ["none"]
        norms = {name: ["native"] for name in ("rms_norm", "fused_add_rms_norm")}
        found["kernel_config"] = {**GPU_ONLY["kernel_config"], "ir_op_priority": norms}
    if compilation:
        found["compilation_config"] = compilation
    return found


def write(name: str, text: str) -> None:
    """Put a result into ``$OUT``, or where the script was started."""
    folder = Path(os.environ.get("OUT", "."))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
