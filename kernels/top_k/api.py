"""The public calls: check their arguments, then run the Triton kernels or the eager twin."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import INTEGERS, describe, expect, expect_contiguous_rows, runs_kernels
from ..tree_attention.launch import power_of_two
from .eager import merge_top_k_eager, top_k_eager, top_k_parts_eager

PART_COLUMNS = 4096  # columns of a row that one program reads
GROUP_COLUMNS = 32
LOGITS = (torch.bfloat16, torch.float16, torch.float32)


class TopK(NamedTuple):
    """The best tokens of some rows, the most probable first.

    ``log_probs [rows, k]`` float32, never above 0; ``tokens [rows, k]`` int32.
    """

    log_probs: Tensor
    tokens: Tensor

    @classmethod
    def allocate(cls, rows: int, k: int, device: torch.device) -> "TopK":
        """Buffers to be given as ``out``, for calls in a CUDA graph."""
        shape = (rows, k)
        log_probs = torch.empty(shape, dtype=torch.float32, device=device)
        return cls(log_probs, torch.empty(shape, dtype=torch.int32, device=device))


def allocate_parts(
    rows: int, columns: int, k: int, device: torch.device, part_columns: int = PART_COLUMNS
) -> Tensor:
    """The buffer that `top_k_parts` wants as ``out``: ``[rows, parts, k + 1]`` int64."""
    parts = -(-columns // part_columns)
    return torch.empty(rows, parts, k + 1, dtype=torch.int64, device=device)


def top_k(
    logits: Tensor,
    k: int,
    token_ids: Tensor | None = None,
    *,
    parts: Tensor | None = None,
    out: TopK | None = None,
) -> TopK:
    """The k most probable tokens of each row with their log-probabilities.

    What ``torch.log_softmax(logits.float(), -1).topk(k)`` gives, in two launches that read the
    logits once and copy them nowhere. At a tie the earlier column comes first. A NaN counts as
    -inf, and +inf as the largest finite number, so the result holds no NaN; in a row without a
    finite logit every log-probability is -inf and the columns are the first ones.

    Args:
        logits: [rows, V] bfloat16, float16 or float32, contiguous in V. Where the vocabulary is
            padded, give the view of the real columns.
        k: 1 to V.
        token_ids: [V] int32 or int64, the token of each column, if the draft has a vocabulary of
            its own. None: a column's token is its number.
        parts: from `allocate_parts`, overwritten; allocated if None.
        out: written in place; allocated if None.

    On CUDA tensors nothing is read on the host and, with ``parts`` and ``out`` given, the call can
    be captured in a CUDA graph. With ``TRITON_INTERPRET=1`` the kernels run in Triton's interpreter
    on CPU tensors too. Otherwise the eager twin does the same, slowly.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit. Contents are not checked.
    """
    _check_logits(logits)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k is {k}: expected 1 to {logits.shape[1]}, the columns of the logits")
    if not runs_kernels(logits):
        out = _checked(out, len(logits), k, token_ids, logits.device)
        for target, result in zip(out, top_k_eager(logits, k, token_ids), strict=True):
            target.copy_(result)
        return out
    return merge_top_k(top_k_parts(logits, k, out=parts), token_ids, out=out)


def top_k_parts(
    logits: Tensor,
    k: int,
    first_column: int = 0,
    *,
    out: Tensor | None = None,
    part_columns: int = PART_COLUMNS,
) -> Tensor:
    """The first launch of `top_k`: the best of every ``part_columns`` columns.

    Where the vocabulary is spread over devices, each calls this on its own columns, the results
    are gathered along dimension 1 and go into `merge_top_k` together, instead of the logits.

    Args:
        logits: [rows, columns], see `top_k`; there may be fewer columns than k.
        k: how many to keep of each part.
        first_column: number of column 0 in the whole vocabulary.
        out: from `allocate_parts`, written in place; allocated if None.
        part_columns: columns of a part, a power of two of at least 32.

    Returns:
        [rows, parts, k + 1] int64: k keys in descending order, of the float32 logit in the upper
        half and the column in the lower (see ``ranking.py``), then the bits of the float32
        log-sum-exp of the part's columns.

    Raises:
        ValueError: as `top_k`.
    """
    _check_logits(logits)
    if part_columns < GROUP_COLUMNS or part_columns != power_of_two(part_columns):
        raise ValueError(f"part_columns is {part_columns}: expected a power of two, at least 32")
    rows, columns = logits.shape
    if out is None:
        out = allocate_parts(rows, columns, k, logits.device, part_columns)
    num_parts = -(-columns // part_columns)
    expect("out", out, torch.int64, (rows, num_parts, k + 1), logits.device)
    if not out.is_contiguous():
        raise ValueError(f"out is {describe(out)} with strides {out.stride()}: make it contiguous")
    if rows == 0:
        return out
    if not runs_kernels(logits):
        top_k_parts_eager(logits, k, first_column, part_columns, out)
        return out

    from .triton_kernel import top_k_parts_kernel

    top_k_parts_kernel[(rows, num_parts)](
        out,
        logits,
        columns,
        first_column,
        out.stride(0),
        logits.stride(0),
        K=k,
        GROUPS=part_columns // GROUP_COLUMNS,
        WIDTH=GROUP_COLUMNS,
        num_warps=4,
    )
    return out


def merge_top_k(parts: Tensor, token_ids: Tensor | None = None, *, out: TopK | None = None) -> TopK:
    """The second launch of `top_k`: the best of all parts, which hold k columns at least.

    Args:
        parts: [rows, parts, k + 1] int64, see `top_k_parts`.
        token_ids: [V] int32 or int64, the token of each column of the whole vocabulary, or None.
        out: written in place; allocated if None.

    Raises:
        ValueError: as `top_k`.
    """
    if parts.dim() != 3 or parts.shape[2] < 2 or not parts.is_contiguous():
        raise ValueError(
            f"parts is {describe(parts)} with strides {parts.stride()}, expected [rows, parts, "
            "k + 1] and contiguous"
        )
    rows, num_parts, entries = parts.shape
    expect("parts", parts, torch.int64, (rows, num_parts, entries), parts.device)
    k = entries - 1
    out = _checked(out, rows, k, token_ids, parts.device)
    if rows == 0:
        return out
    if not runs_kernels(parts):
        for target, result in zip(out, merge_top_k_eager(parts, k, token_ids), strict=True):
            target.copy_(result)
        return out

    from .triton_kernel import merge_top_k_kernel

    merge_top_k_kernel[(rows,)](
        *out,
        parts,
        token_ids,
        num_parts * entries,
        parts.stride(0),
        K=k,
        SLOTS=power_of_two(k),
        ENTRIES=power_of_two(num_parts * entries),
        HAS_MAP=token_ids is not None,
        num_warps=4,
    )
    return out


def _check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.dtype not in LOGITS or logits.shape[1] < 1:
        raise ValueError(
            f"logits is {describe(logits)}, expected bfloat16, float16 or float32 [rows, columns]"
        )
    expect_contiguous_rows("logits", logits)


def _checked(
    out: TopK | None, rows: int, k: int, token_ids: Tensor | None, device: torch.device
) -> TopK:
    if token_ids is not None and (token_ids.dtype not in INTEGERS or token_ids.dim() != 1):
        raise ValueError(f"token_ids is {describe(token_ids)}, expected int32 or int64 [V]")
    if out is None:
        return TopK.allocate(rows, k, device)
    expect("out.log_probs", out.log_probs, torch.float32, (rows, k), device)
    expect("out.tokens", out.tokens, torch.int32, (rows, k), device)
    if not (out.log_probs.is_contiguous() and out.tokens.is_contiguous()):
        raise ValueError("out has gaps between its rows: make it contiguous")
    return out
