"""What the public calls say about a tensor that does not fit, and where they run."""

import os

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)


def runs_kernels(t: Tensor) -> bool:
    """Whether a call on this tensor runs Triton's kernels, or else the eager twin."""
    return t.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


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


def expect_room(
    name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """As `expect`, of a buffer without gaps whose first dimension may be larger than needed."""
    enough = t.dim() == len(shape) and t.shape[0] >= shape[0] and t.shape[1:] == shape[1:]
    if t.dtype != dtype or not enough or t.device != device or not t.is_contiguous():
        gaps = "" if t.is_contiguous() else f" with strides {t.stride()}"
        raise ValueError(
            f"{name} is {describe(t)}{gaps}, expected contiguous {dtype} {list(shape)} or longer "
            f"on {device}"
        )
