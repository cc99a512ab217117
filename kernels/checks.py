"""What the public calls say about a tensor that does not fit."""

import torch
from torch import Tensor


def describe(t: Tensor) -> str:
    """Dtype, shape and device in a few words."""
    return f"{t.dtype} {list(t.shape)} on {t.device}"


def expect(
    name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise ValueError unless ``t`` is such a tensor, contiguous in its last dimension."""
    if t.dtype != dtype or tuple(t.shape) != shape or t.device != device:
        raise ValueError(f"{name} is {describe(t)}, expected {dtype} {list(shape)} on {device}")
    expect_contiguous_rows(name, t)


def expect_contiguous_rows(name: str, t: Tensor) -> None:
    """Raise ValueError unless the last dimension of ``t`` is contiguous."""
    if t.dim() and t.stride(-1) != 1 and t.shape[-1] > 1:
        raise ValueError(
            f"{name} has stride {t.stride(-1)} in its last dimension: make it contiguous there"
        )
