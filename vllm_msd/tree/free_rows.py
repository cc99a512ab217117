"""How many rows a verification may have before they cost time on a GPU: arithmetic, not measured.

A pass reads every weight once, two bytes in bfloat16, and multiplies it with every row, two
operations. Reading takes the longer of the two until ``rows = operations per second / bytes per
second``; up to there the rows of a tree are nearly free, beyond it a tree must shrink. A chain of
``k`` tokens has ``k + 1`` rows a request, a tree of ``n`` nodes ``n + 1``.
"""

import re

# Words of the device's name, dense bfloat16 TFLOP/s, TB/s of memory: NVIDIA's data sheets. The
# first line that fits counts.
_PEAKS = (
    (("B200",), 2250, 8.0),
    (("H200", "NVL"), 835, 4.8),
    (("H200",), 989, 4.8),
    (("H100", "NVL"), 835, 3.9),
    (("H100", "PCIe"), 756, 2.0),
    (("H100",), 989, 3.35),
    (("A100", "40GB"), 312, 1.555),
    (("A100",), 312, 2.04),
    (("L40S",), 362, 0.864),
    (("L4",), 121, 0.3),
    (("A10",), 125, 0.6),
)
# What large matrix products and copies reach of these.
_REACHED_OPERATIONS = 0.7
_REACHED_BANDWIDTH = 0.9


def free_rows(device_name: str) -> int | None:
    """Rows of a step, over all its requests, that are nearly free with weights in 16 bits.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.

    Returns:
        the number, rounded down to tens; None for a device that is not in the table.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", device_name))
    for name, teraflops, terabytes in _PEAKS:
        if words.issuperset(name):
            rows = _REACHED_OPERATIONS * teraflops / (_REACHED_BANDWIDTH * terabytes)
            return int(rows) // 10 * 10
    return None
