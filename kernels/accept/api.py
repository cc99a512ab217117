"""The public call: checks its arguments, then runs the Triton kernel or the eager twin."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import INTEGERS, describe, expect_contiguous_rows, runs_kernels
from ..tree_attention.launch import power_of_two
from .eager import accept_eager


class AcceptedPaths(NamedTuple):
    """What was accepted of R trees of up to T nodes; int64 unless given otherwise.

    ``lengths [R]``: accepted draft tokens, the root not counted. ``nodes [R, T]``: the root and the
    accepted nodes, one per depth, padded with -1. ``tokens [R, T]``: the draw after each of them,
    the ``lengths + 1`` tokens to emit, padded with -1.
    """

    lengths: Tensor
    nodes: Tensor
    tokens: Tensor

    @classmethod
    def allocate(cls, num_requests: int, num_nodes: int, device: torch.device) -> "AcceptedPaths":
        """Buffers to be given as ``out``, for calls in a CUDA graph."""
        # Each on its own: Triton compiles a kernel again for a tensor that begins anywhere.
        shape = (num_requests, num_nodes)
        lengths = torch.empty(num_requests, dtype=torch.int64, device=device)
        nodes, tokens = (torch.empty(shape, dtype=torch.int64, device=device) for _ in range(2))
        return cls(lengths, nodes, tokens)


def accept(
    drawn: Tensor,
    tokens: Tensor,
    parents: Tensor,
    row_start: Tensor,
    *,
    out: AcceptedPaths | None = None,
) -> AcceptedPaths:
    """Walk down each tree as long as the token drawn after a node is one of its children.

    The target has drawn one token after every node: its argmax, or a sample. From the root on, the
    walk goes to the child that carries the drawn token, and ends where there is none; the draws on
    its way are the tokens to emit. The rows of the batch are those of its logits, request by
    request::

        request        0 (6 nodes)       1 (no draft)   2 (3 nodes)
        row            0  1  2  3  4  5  6              7  8  9        row_start [0, 6, 7, 10]
        tokens         .  a  b  c  d  e  .              .  f  g        (roots are not looked at)
        drawn          b  x  e  x  x  y  z              f  g  h
        parents       -1  0  0  1  1  2  -1            -1  0  1
        -> nodes       0 2 5             0              0 1 2
        -> tokens      b e y             z              f g h
        -> lengths     2                 0              2

    Why that is lossless, whatever the draws were made with: siblings have distinct tokens, chosen
    without chance. Recursive rejection sampling over such children accepts child c with exactly the
    target's probability of its token, which is what drawing once and looking for the draw among
    the children does. So the tokens emitted are the target's own draws, greedy or sampled.

    Args:
        drawn: [rows] int32 or int64, the target's token after each row.
        tokens: [rows] int32 or int64, the token of each row's node; siblings have distinct ones (of
            equal ones the first would be taken). -1 stands for a draft that nobody may accept.
        parents: [R, T] int32 or int64, node each node hangs on, an earlier one; -1 at the root.
            Entries past a request's rows are not looked at.
        row_start: [R + 1] int32 or int64, first row of each request, non-decreasing. A request's
            rows are its root and its nodes in order, T at most; none at all give length 0.
        out: written in place; allocated if None.

    On CUDA tensors one launch walks all trees; it reads no tensor on the host and, with ``out``
    given, can be captured in a CUDA graph. With ``TRITON_INTERPRET=1`` the kernel runs in Triton's
    interpreter on CPU tensors too. Otherwise the eager twin does the same, slowly.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit. Contents are not checked.
    """
    if parents.dim() != 2 or parents.shape[1] < 1:
        raise ValueError(f"parents is {describe(parents)}, expected [requests, nodes]")
    num_requests, num_nodes = parents.shape
    if out is None:
        out = AcceptedPaths.allocate(num_requests, num_nodes, parents.device)
    square = (num_requests, num_nodes)
    for name, t, shape in (
        ("drawn", drawn, (drawn.numel(),)),
        ("tokens", tokens, (drawn.numel(),)),
        ("parents", parents, square),
        ("row_start", row_start, (num_requests + 1,)),
        ("out.lengths", out.lengths, (num_requests,)),
        ("out.nodes", out.nodes, square),
        ("out.tokens", out.tokens, square),
    ):
        if t.dtype not in INTEGERS or tuple(t.shape) != shape or t.device != parents.device:
            raise ValueError(
                f"{name} is {describe(t)}, expected int32 or int64 {list(shape)} on "
                f"{parents.device}"
            )
        expect_contiguous_rows(name, t)
    if num_requests == 0:
        return out
    if not runs_kernels(parents):
        accept_eager(drawn, tokens, parents, row_start, out)
        return out

    from .triton_kernel import accept_kernel

    accept_kernel[(num_requests,)](
        *out,
        drawn,
        tokens,
        parents,
        row_start,
        num_nodes,
        out.nodes.stride(0),
        out.tokens.stride(0),
        parents.stride(0),
        NODES=power_of_two(num_nodes),
        num_warps=1,
    )
    return out
