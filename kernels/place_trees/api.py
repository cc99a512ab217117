"""The public call: checks its arguments, then runs the Triton kernel or the eager twin."""

import torch
from torch import Tensor

from ..checks import INTEGERS, describe, expect, expect_room, runs_kernels
from .eager import place_trees_eager

ROWS = 512  # of a request that a program handles at once


def place_trees(
    depths: Tensor,
    ancestors: Tensor,
    slots: Tensor,
    node_start: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    linear: Tensor,
    *,
    tree_start: Tensor,
    root_rows: Tensor,
    row_ancestors: Tensor,
    positions: Tensor,
    shifts: Tensor,
) -> None:
    """Lay stored trees over the rows of a pass: what attention and rotary positions need of them.

    The nodes of a request are the last rows of its query, root first; a request without drafts is
    a root alone and stays causal. A node's rotary position is its root's plus its depth, and the
    linear position that comes in is its root's plus its number::

        request       0, decoding with 3 drafts        1, a prompt's chunk
        row           0     1     2     3              4   5   6       query_start [0, 4, 7]
        node          0     1     2     3              .   .   0       node_start  [0, 4, 5]
        depth         0     1     1     2                              seq_lens    [13, 8]
        linear        9     10    11    12             5   6   7
        -> positions  9     10    10    11             5   6   7
        -> ancestors  0001  0011  0101  1011                   1
        -> tree_start 9                                -1
        -> root_rows  0                                6
        -> shifts     0     0    -1    -1                      0       by node, as node_start

    Args:
        depths, ancestors: [slots or more, T] int64 by slot, as `rerank` writes them.
        slots: [R] int32 or int64, the requests' slots.
        node_start: [R + 1] int32 or int64, first node of each request among all nodes of the step
            (the offsets of its logits); 1 to T nodes a request.
        query_start: [R + 1] int32, first row of each request; more behind them is not looked at.
        seq_lens: [R] int32, positions of each request with these rows, likewise.
        linear: [rows] int64, or [dims, rows] for rotary positions of several dimensions.
        tree_start: [R or more] int32, written: position of the root, -1 for a request that is
            causal and for every entry behind the last request.
        root_rows: [R or more] int64, written: the root's row.
        row_ancestors: [rows] int64, written at the nodes' rows.
        positions: as ``linear``, written at all requests' rows; the same tensor changes in place.
        shifts: [nodes of the step or more, at most rows] int64, written: each node's depth minus
            its number, which sampling adds to linear positions.

    On CUDA tensors one launch does everything; it reads no tensor on the host and can be captured
    in a CUDA graph. With ``TRITON_INTERPRET=1`` the kernel runs in Triton's interpreter on CPU
    tensors too. Otherwise the eager twin does the same, slowly.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit. Contents are not checked.
    """
    device, num_requests = slots.device, len(slots)
    for name, t in (("slots", slots), ("node_start", node_start)):
        if t.dtype not in INTEGERS:
            raise ValueError(f"{name} is {describe(t)}, expected int32 or int64")
    if linear.dim() not in (1, 2) or ancestors.dim() != 2:
        raise ValueError(
            f"linear is {describe(linear)}, expected [rows] or [dims, rows], and ancestors is "
            f"{describe(ancestors)}, expected [slots, T]"
        )
    square = tuple(ancestors.shape)
    for name, t, dtype, shape in (
        ("ancestors", ancestors, torch.int64, square),
        ("depths", depths, torch.int64, square),
        ("slots", slots, slots.dtype, (num_requests,)),
        ("node_start", node_start, node_start.dtype, (num_requests + 1,)),
        ("query_start", query_start, torch.int32, (num_requests + 1,)),
        ("seq_lens", seq_lens, torch.int32, (num_requests,)),
        ("tree_start", tree_start, torch.int32, (num_requests,)),
        ("root_rows", root_rows, torch.int64, (num_requests,)),
        ("row_ancestors", row_ancestors, torch.int64, (linear.shape[-1],)),
        ("shifts", shifts, torch.int64, (num_requests,)),
    ):
        expect_room(name, t, dtype, shape, device)
    for name, t in (("linear", linear), ("positions", positions)):
        expect(name, t, torch.int64, tuple(linear.shape), device)
    if len(tree_start) == 0:
        return
    arguments = (depths, ancestors, slots, node_start, query_start, seq_lens, linear)
    if not runs_kernels(slots):
        place_trees_eager(
            *arguments,
            tree_start=tree_start,
            root_rows=root_rows,
            row_ancestors=row_ancestors,
            positions=positions,
            shifts=shifts,
        )
        return

    from .triton_kernel import place_trees_kernel

    place_trees_kernel[(len(tree_start),)](
        tree_start,
        root_rows,
        row_ancestors,
        positions,
        shifts,
        linear,
        depths,
        ancestors,
        slots,
        node_start,
        query_start,
        seq_lens,
        num_requests,
        ancestors.shape[1],
        positions.stride(0),
        linear.stride(0),
        DIMS=1 if linear.dim() == 1 else linear.shape[0],
        ROWS=ROWS,
        num_warps=4,
    )
