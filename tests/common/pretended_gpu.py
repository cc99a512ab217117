"""vLLM's engines for a CUDA device, as far as a CPU can start them.

    python -m tests.common.pretended_gpu '[{"spec_tokens": 24, "tree": [5, 4]}]' report.json

The platform says that it is an H100, tensors lie in the CPU's memory, and kernels, Triton's and the
native library's, do nothing. So what an engine computes is nonsense, and none is asked. What is
real is the order in which vLLM builds it: configuration for a GPU, the GPU's worker, its memory
profile before there is a KV cache, the profile of its graphs' memory, warm-up, capture, and what
this package does in between. For tests only, in a process of their own.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import tempfile
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from tests.common.worker import REPOSITORY

GIB = 2**30
FACTS = {
    "name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "total_memory": 80 * GIB,
    "multi_processor_count": 132, "is_integrated": False, "L2_cache_size": 50 << 20,
    "shared_memory_per_block_optin": 232448, "warp_size": 32, "uuid": "pretended",
}  # fmt: skip
# Asked when modules of layers are imported, answered by the native library of a GPU's wheel.
CAPABILITIES = (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp4",
    "cutlass_group_gemm_supported",
)
KERNELS = ("settle", "place_trees", "beam_step", "rerank", "draft_prefill")
ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}

launched: Counter[str] = Counter()  # kernels of Triton, by name
_kept: list[Any] = []


class OnHost(TorchFunctionMode):
    """What asks for the device gets the CPU; indices that nonsense made stay in bounds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Call ``func`` with what it can have here."""
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if name in ("pin_memory", "cuda", "record_stream"):
            return args[0]
        if name == "is_pinned":
            return True
        if "device" in kwargs:
            kwargs["device"] = _host(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if name == "to":
            args = (args[0], *map(_host, args[1:]))
        if name == "__getitem__" and getattr(args[1], "dtype", None) in (torch.int32, torch.int64):
            args = (args[0], args[1].clamp(0, len(args[0]) - 1))
        if name == "embedding":
            args = (args[0].clamp(0, len(args[1]) - 1), *args[1:])
        return func(*args, **kwargs)


def _host(device: Any) -> Any:
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(device, str) and device.startswith("cuda") else device


class Nothing:
    """A stream, an event, a graph: everything can be asked of it, and nothing happens."""

    cuda_stream = stream_id = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *exc: Any) -> bool:
        return False

    def query(self) -> bool:
        """An event is always over."""
        return True

    def elapsed_time(self, other: Any) -> float:
        """Milliseconds between two events."""
        return 1.0

    def pool(self) -> tuple[int, int]:
        """A graph's memory."""
        return 0, 1


def pretend() -> None:
    """From here on this process has a GPU. Call it before vLLM is imported."""
    _pretend_device()  # before vLLM is imported, which wraps some of it
    _stand_in_for_libraries()
    OnHost().__enter__()
    _pretend_platform()
    _pretend_launches()


def _stand_in_for_libraries() -> None:
    for name in ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa3_C"):
        sys.modules[name] = types.ModuleType(name)
    importlib.import_module("vllm._C")  # a CPU's norms, activations and rotary embedding
    library = torch.library.Library("_C", "FRAGMENT")
    _kept.append(library)
    for name in CAPABILITIES:
        library.define(f"{name}(int capability) -> bool")
        library.impl(name, lambda capability: False, "CompositeExplicitAutograd")
    # Passes of torch.compile name operations of a GPU's library when they are imported.
    space = type(torch.ops._C)
    find = space.__getattr__

    def found(operations: Any, name: str) -> Any:
        try:
            return find(operations, name)
        except AttributeError:
            asking = sys._getframe(1).f_globals["__name__"]
            if not asking.startswith("vllm.compilation."):
                raise
            return Nothing()

    space.__getattr__ = found


def _pretend_device() -> None:
    stream, facts = Nothing(), types.SimpleNamespace(**FACTS)
    capturing = [False]

    @contextlib.contextmanager
    def graph(*args: Any, **kwargs: Any) -> Iterator[None]:
        capturing[0] = True
        try:
            yield
        finally:
            capturing[0] = False

    def returns(value: Any = None) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    both = {
        "is_available": returns(True),
        "device_count": returns(1),
        "synchronize": returns(),
        "empty_cache": returns(),
        "current_stream": returns(stream),
        "set_stream": returns(),
        "memory_stats": returns(defaultdict(int)),
        "memory_allocated": returns(0),
        "memory_reserved": returns(0),
        "max_memory_allocated": returns(0),
        "reset_peak_memory_stats": returns(),
        "empty_host_cache": returns(),
    }
    memory = (79 * GIB, 80 * GIB)
    for name, value in (both | {
        "get_device_capability": returns((9, 0)),
        "get_device_name": returns(facts.name),
        "get_device_properties": returns(facts),
        "mem_get_info": returns(memory),
        "current_device": returns(0),
        "set_device": returns(),
        "Stream": Nothing,
        "Event": Nothing,
        "CUDAGraph": Nothing,
        "default_stream": returns(stream),
        "stream": returns(stream),
        "graph": graph,
        "graph_pool_handle": returns((0, 1)),
        "is_current_stream_capturing": lambda: capturing[0],
        "set_sync_debug_mode": returns(),
        "get_sync_debug_mode": returns(0),
        "manual_seed_all": returns(),
        "ipc_collect": returns(),
        "init": returns(),
    }).items():  # fmt: skip
        setattr(torch.cuda, name, value)
    for name, value in (both | {
        "set_device_index": returns(),
        "current_device_index": returns(0),
        "current_accelerator": returns(torch.device("cuda")),
        "get_memory_info": returns(memory),
    }).items():  # fmt: skip
        setattr(torch.accelerator, name, value)
    torch.cuda.memory.get_allocator_backend = returns("native")
    torch.cuda.memory._set_allocator_settings = returns()
    torch._C._accelerator_setAllocatorSettings = returns()
    torch.Event = torch.Stream = Nothing


def _pretend_platform() -> None:
    import vllm.platforms
    from vllm.platforms import cuda

    platform = cuda.NonNvmlCudaPlatform
    platform.dist_backend, platform.dispatch_key = "gloo", "CPU"
    vllm.platforms._current_platform = platform()
    cuda.CudaPlatform = platform


def _pretend_launches() -> None:
    from vllm_msd.vllm_plugin import plugin

    plugin.register()  # before anything here imports vLLM's workers, which bind what it replaces
    from triton.runtime import autotuner, jit
    from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry
    from vllm.utils import torch_utils
    from vllm.v1.worker.gpu import buffer_utils

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched[kernel.__name__] += 1

    def only_ours(registry: Any) -> None:  # vLLM's own ask a driver for its signatures
        for kernel in registry._registrations:
            if type(kernel).__module__.startswith("vllm_msd"):
                kernel.compile_many(kernel.get_warmup_keys())

    jit.JITFunction.run = launch
    autotuner.Autotuner.run = lambda *args, **kwargs: None
    JitWarmupRegistry.warmup = only_ours
    for module in (torch_utils, buffer_utils):
        module.get_accelerator_view_from_cpu_tensor = lambda tensor: tensor

    # Ours run their definitions on a CPU, which nonsense would break.
    def nothing(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: launched.update([name])

    for kernel in KERNELS:
        api = importlib.import_module(f"vllm_msd.kernels.{kernel}.api")
        setattr(api, f"{kernel}_eager", nothing(kernel))
    attention = importlib.import_module("vllm_msd.kernels.tree_attention.api")
    attention.tree_attention_eager = nothing("tree_attention")
    accept = importlib.import_module("vllm_msd.kernels.accept.api")

    def none_accepted(drawn: Any, tokens: Any, parents: Any, row_start: Any, out: Any) -> None:
        launched.update(["accept"])
        out.lengths.fill_(1)
        out.nodes.fill_(-1)
        out.tokens.zero_()

    accept.accept_eager = none_accepted


def started(spec_tokens: int | None, tree: tuple[int, int] | None, auto: bool) -> dict[str, Any]:
    """Start an engine of the demo pair in CUDA graphs; what happened on the way.

    ``caches_left``: KV caches of the time before that were still in memory when the next ones were
    allocated.

    Args:
        spec_tokens: of the draft, at most where ``auto``; None for no speculation.
        tree: depth and width; None for a chain.
        auto: whether the sizes are left to the plugin.
    """
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from tests.common.cuda_graphs.moving_sizes import draft_of_trees
    from vllm_msd.demo.paths import demo_pair

    pair, steps, caches, left = demo_pair(), [], [], []
    names = ("profile_run", "profile_cudagraph_memory", "initialize_kv_cache", "capture_model")

    def noted(name: str) -> Callable[..., Any]:
        original = getattr(GPUModelRunner, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            steps.append(name)
            if name != "initialize_kv_cache":
                return original(self, *args, **kwargs)
            gc.collect()
            left.append(sum(not cache.expired() for cache in caches))
            result = original(self, *args, **kwargs)
            layers = self.vllm_config.compilation_config.static_forward_context.values()
            held = [layer.kv_cache for layer in layers if hasattr(layer, "kv_cache")]
            caches[:] = [StorageWeakRef(cache.untyped_storage()) for cache in held]
            return result

        return method

    options: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if spec_tokens is not None:
            config: dict[str, Any] = {"method": "msd", "model": str(pair.draft)}
            sizes = {} if tree is None else {"tree_depth": tree[0], "tree_top_k": tree[1]}
            if auto and tree is not None:
                own = Path(folder) / "draft"
                config["model"] = draft_of_trees(str(pair.draft), own, spec_tokens, *tree)
            elif not auto:
                config |= {"num_speculative_tokens": spec_tokens, **sizes}
            options["speculative_config"] = config
        for name in names:
            original = getattr(GPUModelRunner, name)
            setattr(GPUModelRunner, name, noted(name))
            stack.callback(setattr, GPUModelRunner, name, original)
        before = launched.copy()
        engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(pair.target), dtype="float32", seed=0, max_model_len=256,
                max_num_seqs=4, max_num_batched_tokens=256, attention_backend="TRITON_ATTN",
                mm_encoder_attn_backend="TORCH_SDPA", gpu_memory_utilization=0.02,
                compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
                limit_mm_per_prompt={"image": 1}, **options,
            )
        )  # fmt: skip
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    speculator = runner.speculator
    managers = {
        "target": runner.cudagraph_manager,
        "prefill": getattr(speculator, "prefill_cudagraph_manager", None),
        "compact": getattr(speculator, "compact_cudagraph_manager", None),
        "decode": getattr(speculator, "decode_cudagraph_manager", None),
    }
    return {
        "steps": steps,
        "caches_left": left,
        "worker": type(engine.engine_core.engine_core.model_executor.driver_worker.worker).__name__,
        "graphs": {k: len(m.graphs) for k, m in managers.items() if m is not None},
        "launched": dict(launched - before),
    }


def main(orders: list[dict[str, Any]], report: Path) -> None:
    """Start one engine after another and write what happened."""
    pretend()
    usual = {"spec_tokens": None, "tree": None, "auto": False}
    report.write_text(json.dumps([started(**usual | order) for order in orders]))


if __name__ == "__main__":
    backend = str(REPOSITORY / "tests" / "common" / "triton_interpreter")
    if backend not in sys.path:  # vLLM looks for it when Triton is imported, in new processes too
        path = os.pathsep.join([backend, str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": path}
        os.execve(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:]], environment)
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
