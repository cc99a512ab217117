"""Laying trees over rows as its definition reads: one request at a time."""

from torch import Tensor


def place_trees_eager(
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
    """Same as ``place_trees``; waits for the device."""
    tree_start.fill_(-1)
    starts, rows = node_start.tolist(), query_start.tolist()
    for request, slot in enumerate(slots.tolist()):
        begin, end = rows[request], rows[request + 1]
        nodes = starts[request + 1] - starts[request]
        root = end - nodes
        root_rows[request] = root
        if nodes > 1:
            tree_start[request] = seq_lens[request] - nodes
        row_ancestors[root:end] = ancestors[slot, :nodes]
        positions[..., begin:end] = linear[..., begin:end]
        for node in range(nodes):
            shift = depths[slot, node] - node
            positions[..., root + node] += shift
            shifts[starts[request] + node] = shift
