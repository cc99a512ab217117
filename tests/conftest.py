"""What needs a CUDA device is skipped, with the reason, where there is none."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

GPU_TESTS = Path(__file__).parent / "gpu"


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
