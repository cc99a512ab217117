"""Laying trees over rows as its definition reads: one request at a time."""


def place_trees_eager(
    depths,
    ancestors,
    slots,
    node_start,
    query_start,
    seq_lens,
    linear,
    *,
    tree_start,
    root_rows,
    row_ancestors,
    positions,
):
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
            positions[..., root + node] += depths[slot, node] - node
