"""The public call: checks its arguments, then runs the Triton kernel or the eager twin."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..beam_step.api import LevelInputs
from ..checks import INTEGERS, describe, expect, expect_room, runs_kernels
from ..tree_attention.launch import power_of_two
from .eager import draft_prefill_eager

PROGRAM_VALUES = 8192  # hidden values that a program moves at once


class Verified(NamedTuple):
    """A step in which each of R requests verified a tree, and what was accepted of it.

    ``nodes [R, T]`` int64, the root and the accepted nodes, padded with -1. ``root_rows [R]``
    int64, the root's row of the step. ``tree_start [R or more]`` int32, its position. ``slots [R]``
    int32 or int64. ``input_ids [rows]`` int32 and ``hidden [rows, H]``, what the target read and
    gave, a request's nodes one after another. ``emitted [slots, ...]`` int64, by slot, the last
    token that was emitted.
    """

    nodes: Tensor
    root_rows: Tensor
    tree_start: Tensor
    slots: Tensor
    input_ids: Tensor
    hidden: Tensor
    emitted: Tensor


class PrefillRows(NamedTuple):
    """Where a pass of the draft finds its requests; all may be longer than R.

    ``query_start [n + 1]`` int32, first row of each request. ``last_rows [n]`` int64, the row whose
    output the next tree grows from. ``slots [n]`` int64, -1 for padding.
    """

    query_start: Tensor
    last_rows: Tensor
    slots: Tensor


def draft_prefill(
    step: Verified,
    block_table: Tensor,
    block_size: int,
    width: int,
    inputs: LevelInputs,
    rows: PrefillRows,
) -> None:
    """Lay the accepted paths out as the draft's next rows, ``width`` of them a request.

    Row i of a request is the i-th node of its path: the target's hidden state of that node beside
    the token of the next one, and behind the last node the token that was emitted after it. The
    draft counts linearly, in positions and in KV slots. Rows behind a path are zeros, they write
    slots that the next rows write again::

        path            0     2     5                 a tree of 7 rows, of which 3 were accepted
        row             0     1     2     3           width 4
        hidden          h0    h2    h5    0
        token           t2    t5    emitted 0
        position        9     10    11    12          tree_start 9, seq_lens 13, last_rows 2

    Args:
        step: what was verified. Paths have at most ``width`` nodes; more of them are cut off.
        block_table: [slots, blocks] int32, by slot, of the draft's KV cache.
        block_size: its slots a block.
        width: rows of each request.
        inputs: written; at least ``R * width`` rows and R lengths. Requests behind R up to the
            number of lengths are padding: their length is 0, their KV slots are -1.
        rows: written, the padding too.

    On CUDA tensors one launch does everything; it reads no tensor on the host and can be captured
    in a CUDA graph. With ``TRITON_INTERPRET=1`` the kernel runs in Triton's interpreter on CPU
    tensors too. Otherwise the eager twin does the same, slowly.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit. Contents are not checked.
    """
    device, (num_requests, num_nodes) = step.nodes.device, step.nodes.shape
    padded = len(inputs.seq_lens)
    if width < 1 or num_requests > padded:
        raise ValueError(
            f"width {width} with {num_requests} requests: expected 1 or more, and at most "
            f"{padded} requests"
        )
    if step.slots.dtype not in INTEGERS:
        raise ValueError(f"slots is {describe(step.slots)}, expected int32 or int64")
    drafted = num_requests * width
    for name, t, dtype, shape in (
        ("nodes", step.nodes, torch.int64, (num_requests, num_nodes)),
        ("root_rows", step.root_rows, torch.int64, (num_requests,)),
        ("tree_start", step.tree_start, torch.int32, (num_requests,)),
        ("slots", step.slots, step.slots.dtype, (num_requests,)),
        ("input_ids", step.input_ids, torch.int32, (len(step.hidden),)),
        ("emitted", step.emitted.flatten(), torch.int64, (len(block_table),)),
        ("inputs.input_ids", inputs.input_ids, torch.int32, (drafted,)),
        ("inputs.positions", inputs.positions, torch.int64, (drafted,)),
        ("inputs.kv_slots", inputs.kv_slots, torch.int64, (drafted,)),
        ("inputs.seq_lens", inputs.seq_lens, torch.int32, (num_requests,)),
        ("rows.query_start", rows.query_start, torch.int32, (padded + 1,)),
        ("rows.last_rows", rows.last_rows, torch.int64, (padded,)),
        ("rows.slots", rows.slots, torch.int64, (padded,)),
    ):
        expect_room(name, t, dtype, shape, device)
    if block_table.dim() != 2:
        raise ValueError(f"block_table is {describe(block_table)}, expected [slots, blocks]")
    expect("block_table", block_table, torch.int32, tuple(block_table.shape), device)
    hidden, out = step.hidden, inputs.hidden
    if hidden.dim() != 2 or out.dim() != 2:
        raise ValueError(f"hidden is {describe(hidden)}, expected [rows, H]")
    expect("hidden", hidden, out.dtype, (len(hidden), out.shape[1]), device)
    expect("inputs.hidden", out, out.dtype, (max(len(out), drafted), out.shape[1]), device)
    if padded == 0:
        return
    if not runs_kernels(step.nodes):
        draft_prefill_eager(step, block_table, block_size, width, inputs, rows)
        return

    from .triton_kernel import draft_prefill_kernel

    slots_of_rows = power_of_two(width)
    columns = min(power_of_two(out.shape[1]), max(16, PROGRAM_VALUES // slots_of_rows))
    draft_prefill_kernel[(padded, -(-out.shape[1] // columns))](
        inputs.input_ids,
        inputs.positions,
        inputs.kv_slots,
        inputs.seq_lens,
        out,
        rows.query_start,
        rows.last_rows,
        rows.slots,
        step.nodes,
        step.root_rows,
        step.tree_start,
        step.slots,
        step.input_ids,
        hidden,
        step.emitted,
        block_table,
        num_requests,
        num_nodes,
        width,
        len(inputs.kv_slots),
        out.shape[1],
        step.emitted.stride(0),
        block_table.stride(0),
        hidden.stride(0),
        out.stride(0),
        BLOCK_SIZE=block_size,
        WIDTH=slots_of_rows,
        COLUMNS=columns,
        num_warps=4,
    )
