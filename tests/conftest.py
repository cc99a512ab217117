"""What needs a CUDA device is skipped where there is none; tests that take long must say so."""

from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

GPU_TESTS = Path(__file__).parent / "gpu"
LONG_SECONDS = 60


def pytest_report_header() -> str:
    try:
        return f"vllm: {version('vllm')}"
    except PackageNotFoundError:
        return "vllm: not installed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needy = [i for i in items if GPU_TESTS in i.path.parents or i.get_closest_marker("gpu")]
    if not needy:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device; torch sees none")
        for item in needy:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the tests that took longer than `make test FAST=1` would have them."""
    seconds: Counter[str] = Counter()
    for report in terminalreporter.getreports("") + terminalreporter.getreports("passed"):
        if "long" not in report.keywords:
            seconds[report.nodeid] += report.duration
    for name, taken in seconds.most_common():
        if taken > LONG_SECONDS:
            terminalreporter.write_line(f"took {taken:.0f} s and is not marked `long`: {name}")
