"""A small in-process vLLM engine on the CPU in fp32, and what its metrics say about speculation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

# Engines of `cuda_graphs.engines.gpu_wiring` capture graphs in this mode; None: no graphs.
CUDAGRAPH_MODE: str | None = None


def open_engine(
    target: str,
    draft: str | None,
    spec_tokens: int = 5,
    draft_sample_method: str = "greedy",
    tree: tuple[int, int] | None = None,
    schedule: list[list[int]] | None = None,
    adaptive: bool = False,
    **options: Any,
) -> Any:
    """An in-process fp32 ``vllm.LLM``, small enough that chunked prefill and mixed steps happen.

    Args:
        target: folder of the target.
        draft: folder of the draft; None for no speculation.
        spec_tokens: drafted tokens of a chain, or nodes of a tree.
        draft_sample_method: ``greedy`` or ``probabilistic``.
        tree: depth and width; None for a chain.
        schedule: drafted tokens by batch size, vLLM's ``num_speculative_tokens_per_batch_size``.
        adaptive: vLLM's ``enable_adaptive_verification``.
        options: further engine arguments, or other values of those set here.
    """
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 448,
        "kv_cache_memory_bytes": 256 << 20,
        "limit_mm_per_prompt": {"image": 3},
        "disable_log_stats": False,
        "seed": 0,
    }
    if draft is not None:
        settings["speculative_config"] = {
            "method": "msd",
            "model": draft,
            "num_speculative_tokens": spec_tokens,
            "draft_sample_method": draft_sample_method,
        }
        if tree is not None:
            depth, top_k = tree
            settings["speculative_config"] |= {"tree_depth": depth, "tree_top_k": top_k}
        if schedule is not None:
            settings["speculative_config"]["num_speculative_tokens_per_batch_size"] = schedule
        if adaptive:
            settings["speculative_config"]["enable_adaptive_verification"] = True
    settings |= options
    if CUDAGRAPH_MODE is not None:
        settings |= _with_graphs(CUDAGRAPH_MODE, 1 + (spec_tokens if draft else 0), **settings)
    return LLM(model=target, **settings)


def _with_graphs(
    mode: str, rows: int, *, max_num_seqs: int, max_num_batched_tokens: int, **_: Any
) -> dict[str, Any]:
    """Engine arguments for graphs of decoding batches, some of which have to be padded.

    ``FULL`` replays prompts, too: one graph takes any step.

    Args:
        mode: vLLM's ``cudagraph_mode``.
        rows: of a request that decodes.
        max_num_seqs: the largest batch.
        max_num_batched_tokens: the largest step.
    """
    requests = [n for n in (1, 2, 4, 6, 9, 16) if n <= max_num_seqs]
    largest = [max_num_batched_tokens] if mode == "FULL" else []
    compilation = {
        "mode": 0,
        "cudagraph_mode": mode,
        "cudagraph_capture_sizes": sorted({*requests, *(n * rows for n in requests), *largest}),
    }
    return {"enforce_eager": False, "compilation_config": compilation}


@contextmanager
def running_engine(*args: Any, **options: Any) -> Iterator[Any]:
    """``open_engine``, closed at the end, so that another one can follow in the same process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cores = os.sched_getaffinity(0)
    engine = open_engine(*args, **options)
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
        os.sched_setaffinity(0, cores)  # the engine bound this process to some of them


@contextmanager
def forced_async_scheduling() -> Iterator[None]:
    """Engines opened inside schedule asynchronously, which vLLM turns off on CPUs.

    Each step is scheduled before the output of the one before it is known, drafts included.
    """
    from vllm.platforms.cpu import CpuPlatform

    check_and_update = CpuPlatform.check_and_update_config

    def switch_on(vllm_config: Any) -> None:
        check_and_update(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    with mock.patch.object(CpuPlatform, "check_and_update_config", staticmethod(switch_on)):
        yield


@contextmanager
def pictures_kept_for_resumption() -> Iterator[None]:
    """Work around a crash of vLLM 0.32 and 0.33 under Model Runner V1, speculation or not.

    A picture that a request finds in the prefix cache is not sent to the worker. When the request
    is preempted and resumed after those blocks are gone, the worker must encode it, and ends with
    "Encoder cache miss". Here every picture is sent.
    """
    from vllm.v1.core.sched import output

    with mock.patch.object(output, "strip_covered_mm_data", lambda features, *_, **__: features):
        yield


def scheduler_of(engine: Any) -> Any:
    """The scheduler of an in-process engine."""
    return engine.llm_engine.engine_core.engine_core.scheduler


def runner_of(engine: Any) -> str:
    """``"v1"`` or ``"v2"``: the model runner that this engine really uses."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def is_v1(worker: Any) -> bool:
        return isinstance(worker.model_runner, GPUModelRunner)

    return "v1" if engine.collective_rpc(is_v1)[0] else "v2"


@dataclass(frozen=True)
class Acceptance:
    """vLLM's own counters since the engine started, or between two readings of them."""

    steps: int
    drafted: int
    accepted: int

    @property
    def rejected(self) -> int:
        return self.drafted - self.accepted

    def __sub__(self, earlier: Acceptance) -> Acceptance:
        return Acceptance(
            self.steps - earlier.steps,
            self.drafted - earlier.drafted,
            self.accepted - earlier.accepted,
        )


def acceptance(engine: Any) -> Acceptance:
    """What vLLM's metrics say about speculation in this process."""
    values = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    prefix = "vllm:spec_decode_num_"
    names = ("drafts", "draft_tokens", "accepted_tokens")
    return Acceptance(*(int(values.get(prefix + name, 0)) for name in names))


def counted(counts: Acceptance) -> dict[str, int]:
    """The counters as plain numbers."""
    return {**asdict(counts), "rejected": counts.rejected}
