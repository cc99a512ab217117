"""The row rule: which device's figures a name stands for."""

import pytest

from vllm_msd.tree.free_rows import free_rows


@pytest.mark.parametrize(
    ("device", "rows"),
    [
        ("NVIDIA H200", 160),
        ("NVIDIA H200 NVL", 130),
        ("NVIDIA H100 80GB HBM3", 220),
        ("NVIDIA H100 PCIe", 290),
        ("NVIDIA A100-SXM4-80GB", 110),
        ("NVIDIA A100-PCIE-40GB", 150),
        ("NVIDIA L40S", 320),
        ("NVIDIA GH200 480GB", None),  # not an H200
        ("NVIDIA A100X", None),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_rows_by_name(device, rows):
    assert free_rows(device) == rows
