"""vLLM engines on the wiring of a GPU, on a CPU: Triton attention, and emulated CUDA graphs.

What stops graphs on a CPU, in vLLM 0.32 and 0.33: `Platform.support_static_graph_mode` is False, so
the config sets cudagraph_mode NONE; `CpuPlatform.check_and_update_config` empties the capture
sizes; `CPUWorker.compile_or_warm_up_model` never calls `capture_model`; and the CPU's attention
plans on the host. Here TRITON_ATTN takes its place, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from tests.common import fp32_engine
from tests.common.cuda_graphs.device import emulated_graphs
from tests.common.cuda_graphs.fast_kernels import fast_kernels

TRITON_ATTENTION = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"


@contextmanager
def gpu_wiring(
    graphs: str | None = None, interpreted: bool = False, profile: bool = False
) -> Iterator[None]:
    """Engines that `fp32_engine.open_engine` opens inside run as on a GPU.

    Args:
        graphs: their ``cudagraph_mode``; None runs them eagerly.
        interpreted: attend, and grow trees, with the Triton kernels themselves, seconds a step,
            instead of their stand-ins in PyTorch.
        profile: measure memory as a GPU's worker does before there is a KV cache: one run of the
            largest batch, and all graphs captured over a small cache that is thrown away with them.
    """
    from vllm_msd.vllm_plugin import plugin

    plugin.register()  # before anything here imports vLLM's workers, which bind what it replaces
    with ExitStack() as stack:
        stack.enter_context(_triton_attention())
        if not interpreted:
            stack.enter_context(fast_kernels())
        if graphs is not None:
            stack.enter_context(_graphs(profile))
            stack.enter_context(mock.patch.object(fp32_engine, "CUDAGRAPH_MODE", graphs))
        yield


def replays(engine: Any) -> dict[str, dict[str, int]]:
    """How often the captured graphs of an in-process engine were replayed: by manager and size.

    ``target``, ``prefill`` (the draft's), ``compact`` (the same after trees) and ``decode`` (its
    levels or steps); empty without graphs.
    """
    if fp32_engine.CUDAGRAPH_MODE is None:
        return {}
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    speculator = getattr(runner, "speculator", None)
    managers = {
        "target": getattr(runner, "cudagraph_manager", None),
        "prefill": getattr(speculator, "prefill_cudagraph_manager", None),
        "compact": getattr(speculator, "compact_cudagraph_manager", None),
        "decode": getattr(speculator, "decode_cudagraph_manager", None),
    }
    return {
        name: {
            f"{desc.num_reqs} requests, {desc.num_tokens} rows{_levels(desc)}": graph.replays
            for desc, graph in manager.graphs.items()
        }
        for name, manager in managers.items()
        if manager is not None
    }


def _levels(desc: Any) -> str:
    return f", {desc.levels} levels" if hasattr(desc, "levels") else ""


@contextmanager
def _triton_attention() -> Iterator[None]:
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    before = AttentionBackendEnum.CPU_ATTN.get_path()

    def use(backend: str) -> None:
        register_backend(AttentionBackendEnum.CPU_ATTN, backend)
        selector._cached_get_attn_backend.cache_clear()

    use(TRITON_ATTENTION)
    try:
        # vLLM's launcher of the cache update picks its tile by the device's generation.
        with mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)):
            yield
    finally:
        use(before)


@contextmanager
def _graphs(profile: bool) -> Iterator[None]:
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.workspace import init_workspace_manager

    check, measure = CpuPlatform.check_and_update_config, CPUWorker.determine_available_memory
    warm_up = CPUWorker.compile_or_warm_up_model

    def keep_sizes(config: Any) -> None:
        sizes = config.compilation_config.cudagraph_capture_sizes
        check(config)
        config.compilation_config.cudagraph_capture_sizes = sizes

    def measure_too(worker: Any) -> int:
        if profile and worker.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            init_workspace_manager(worker.device)
            with (
                mock.patch.object(torch.accelerator, "synchronize"),
                mock.patch.object(torch.accelerator, "empty_cache"),
            ):
                worker.model_runner.profile_run()  # a GPU's worker always does
            worker.model_runner.profile_cudagraph_memory()
        return measure(worker)

    def capture_too(worker: Any) -> Any:
        times = warm_up(worker)
        if worker.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            init_workspace_manager(worker.device)
            worker.model_runner.capture_model()
        return times

    with ExitStack() as stack:
        stack.enter_context(emulated_graphs())
        for place, name, value in (
            (CpuPlatform, "support_static_graph_mode", classmethod(lambda cls: True)),
            (CpuPlatform, "check_and_update_config", staticmethod(keep_sizes)),
            (CpuPlatform, "graph_pool_handle", staticmethod(lambda: (0, 1))),
            (CPUWorker, "determine_available_memory", measure_too),
            (CPUWorker, "compile_or_warm_up_model", capture_too),
        ):
            stack.enter_context(mock.patch.object(place, name, value, create=True))
        yield
