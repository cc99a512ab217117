"""Laying trees over rows in Triton: one program per request, padding included."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["num_requests", "num_nodes"],
    do_not_specialize_on_alignment=[
        "tree_start_ptr",
        "root_rows_ptr",
        "slots_ptr",
        "node_start_ptr",
        "query_start_ptr",
        "seq_lens_ptr",
    ],
)
def place_trees_kernel(
    tree_start_ptr,  # [padded requests] int32
    root_rows_ptr,  # [R] int64
    row_ancestors_ptr,  # [rows] int64
    positions_ptr,  # [DIMS, rows] int64
    shifts_ptr,  # [nodes] int64
    linear_ptr,  # [DIMS, rows] int64, may be the same
    depths_ptr,  # [slots, num_nodes] int64
    ancestors_ptr,  # [slots, num_nodes] int64
    slots_ptr,  # [R] int32 or int64
    node_start_ptr,  # [R + 1] int32 or int64
    query_start_ptr,  # [R + 1] int32
    seq_lens_ptr,  # [R] int32
    num_requests,
    num_nodes,
    stride_positions,
    stride_linear,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    request = tl.program_id(0)
    if request >= num_requests:
        tl.store(tree_start_ptr + request, -1)
        return
    begin = tl.load(query_start_ptr + request)
    end = tl.load(query_start_ptr + request + 1)
    first_node = tl.load(node_start_ptr + request).to(tl.int32)
    nodes = tl.load(node_start_ptr + request + 1).to(tl.int32) - first_node
    root = end - nodes
    start = tl.load(seq_lens_ptr + request) - nodes
    tl.store(tree_start_ptr + request, tl.where(nodes > 1, start, -1))
    tl.store(root_rows_ptr + request, root.to(tl.int64))
    tree = tl.load(slots_ptr + request).to(tl.int64) * num_nodes
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < end
        node = row - root
        in_tree = inside & (node >= 0)
        depth = tl.load(depths_ptr + tree + node, mask=in_tree, other=0)
        shift = tl.where(in_tree, depth - node, 0)
        for dim in tl.static_range(DIMS):
            linear = tl.load(linear_ptr + dim * stride_linear + row, mask=inside)
            tl.store(positions_ptr + dim * stride_positions + row, linear + shift, mask=inside)
        tl.store(shifts_ptr + first_node + node, shift, mask=in_tree)
        visible = tl.load(ancestors_ptr + tree + node, mask=in_tree)
        tl.store(row_ancestors_ptr + row, visible, mask=in_tree)
