"""The draft's rows as their definition reads: one request at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..beam_step.api import LevelInputs
    from .api import PrefillRows, Verified


def draft_prefill_eager(
    step: Verified,
    block_table: Tensor,
    block_size: int,
    width: int,
    inputs: LevelInputs,
    rows: PrefillRows,
) -> None:
    """Same as ``draft_prefill``; waits for the device."""
    num_requests = len(step.nodes)
    inputs.seq_lens.fill_(0)
    rows.last_rows.fill_(0)
    rows.slots.fill_(-1)
    starts = torch.arange(len(rows.query_start), device=step.nodes.device) * width
    rows.query_start.copy_(starts.clamp(max=num_requests * width))
    padding = (len(inputs.seq_lens) - num_requests) * width
    inputs.kv_slots[num_requests * width :][:padding] = -1
    for request, slot in enumerate(step.slots.tolist()):
        begin, end = request * width, (request + 1) * width
        path = step.nodes[request, :width]
        taken = int(step.root_rows[request]) + path[path >= 0]
        length = len(taken)
        inputs.hidden[begin:end] = 0
        inputs.hidden[begin : begin + length] = step.hidden[taken]
        inputs.input_ids[begin:end] = 0
        inputs.input_ids[begin : begin + length - 1] = step.input_ids[taken[1:]]
        inputs.input_ids[begin + length - 1] = step.emitted[slot].flatten()[0].int()
        position = int(step.tree_start[request]) + torch.arange(width, device=path.device)
        inputs.positions[begin:end] = position
        block = block_table[slot, position // block_size].long()
        inputs.kv_slots[begin:end] = block * block_size + position % block_size
        inputs.seq_lens[request] = int(step.tree_start[request]) + width
        rows.last_rows[request] = begin + length - 1
        rows.slots[request] = slot
