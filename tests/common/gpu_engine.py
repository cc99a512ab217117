"""One engine on a CUDA device, in a process of its own: `gpu_engine_answers`.

    python -m tests.common.gpu_engine '{"tree": [5, 4], "spec_tokens": 16}' report.json

Without a device the engine runs on the CPU, without graphs: a rehearsal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tests.common.worker import REPOSITORY

GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}


def gpu_engine_answers(timeout: float = 600, sync_check: str | None = "error", **order: Any) -> Any:
    """Run `answers` in a fresh process; returns its report.

    Args:
        timeout: seconds.
        sync_check: vLLM's VLLM_GPU_SYNC_CHECK: ``error`` ends the engine where the host waits for
            the device after warm-up.
        order: arguments of `answers`.

    Raises:
        RuntimeError: the process failed; the message ends with what it printed last.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    if sync_check and os.environ.get("KIT_NO_C") != "1":  # buffers are not pinned then
        environment["VLLM_GPU_SYNC_CHECK"] = sync_check
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        if order.get("auto"):  # costs of another run are none of this one's
            environment["VLLM_CACHE_ROOT"] = folder
        command = [sys.executable, "-m", "tests.common.gpu_engine", json.dumps(order), str(report)]
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode or not report.exists():
            raise RuntimeError(f"ended with {done.returncode}:\n{done.stdout[-6000:]}")
        return json.loads(report.read_text())


@contextmanager
def compiled_kernels() -> Iterator[list[str]]:
    """Names of the Triton kernels that are compiled inside."""
    from triton import knobs

    names: list[str] = []
    before = knobs.runtime.jit_post_compile_hook

    def note(*args: Any, **kwargs: Any) -> Any:
        kernel = kwargs.get("fn", args[2] if len(args) > 2 else None)
        names.append(f"{kernel.module}.{kernel.name}" if hasattr(kernel, "module") else str(kernel))
        return before(*args, **kwargs) if before is not None else None

    knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = before


def answers(
    *,
    draft: bool = True,
    auto: bool = False,
    best: list[int] | None = None,
    seqs: int | None = None,
    tree: tuple[int, int] | None = None,
    spec_tokens: int = 5,
    dtype: str = "float32",
    backend: str | None = None,
    requests: int = 12,
    longest: int = 48,
) -> dict[str, Any]:
    """Greedy answers of the demo pair, and what happened on the way to them.

    Args:
        draft: whether to speculate.
        auto: leave the sizes to the plugin, of the tree or the demo's chain; the costs that it
            measured come back as ``costs``.
        best: have them follow other costs, see `moving_sizes.left_to_the_plugin`.
        seqs: most requests at a time, with the CUDA graphs that the engine chooses; None for six
            and, unless ``auto``, few graphs.
        tree: depth and width; None for a chain.
        spec_tokens: nodes of the tree, or tokens of the chain.
        dtype: of the target and the cache.
        backend: of attention; None for the engine's choice.
        requests: with and without images, six at a time.
        longest: tokens of the longest answer.
    """
    import torch
    from vllm import SamplingParams
    from vllm.platforms import current_platform

    from tests.common.cuda_graphs.answers import OPTIONS
    from tests.common.cuda_graphs.moving_sizes import (
        draft_of_trees,
        left_to_the_plugin,
        steps_of,
    )
    from tests.common.fp32_engine import acceptance, counted, open_engine
    from tests.common.lossless import demo_requests
    from vllm_msd.demo.paths import demo_pair

    pair, on_gpu = demo_pair(), current_platform.is_cuda()
    rows = 1 + (spec_tokens if draft else 0)
    options = {**OPTIONS, "dtype": dtype}
    if seqs is not None:
        options |= {"max_num_seqs": seqs, "max_num_batched_tokens": 2048}
    if on_gpu:
        sizes = sorted({n * m for n in (1, 2, 4, 6) for m in (1, rows)})
        graphs = {"cudagraph_capture_sizes": sizes} if seqs is None and not auto else {}
        options |= {
            "enforce_eager": False,
            "compilation_config": GRAPHS | graphs,
            "gpu_memory_utilization": 0.2,
        }
        if backend is not None:
            options["attention_backend"] = backend
    target = str(pair.target)
    folder = tempfile.TemporaryDirectory()
    if auto:
        own = str(pair.draft)
        if tree is not None:
            own = draft_of_trees(own, Path(folder.name) / "draft", spec_tokens, *tree)
        options["speculative_config"] = {"method": "msd", "model": own}
    forced = left_to_the_plugin(best, measured=True) if best else nullcontext()
    with folder, forced as measured, compiled_kernels() as early:
        engine = open_engine(
            target, str(pair.draft) if draft else None, spec_tokens, tree=tree, **options
        )
    asked = demo_requests(target, requests, [longest, 9, longest // 2, 17], seed=91_000)
    params = [
        SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True) for r in asked
    ]
    with compiled_kernels() as late, steps_of(engine) as steps:
        outputs = engine.generate([r.for_vllm() for r in asked], params, use_tqdm=False)
    worker = engine.llm_engine.model_executor.driver_worker.worker
    manager = getattr(worker.model_runner, "cudagraph_manager", None)
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    found = {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}
    if auto and measured is None:
        draft_config = worker.vllm_config.speculative_config.draft_model_config.hf_config
        measured = getattr(draft_config, "msd_costs", None)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
        "acceptance": counted(acceptance(engine)),
        "costs": measured,
        "steps": steps,
        "graphs": len(manager.graphs) if manager is not None else 0,
        "backends": sorted(found),
        "compiled_at_start": sorted(set(early)),
        "compiled_late": sorted(set(late)),
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answers(**json.loads(sys.argv[1]))))
