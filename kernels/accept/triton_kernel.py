"""The walk in Triton: one program per request, a tree's nodes side by side in one warp."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["num_nodes"],
    # Results are the halves of one allocation, inputs pieces of a step's.
    do_not_specialize_on_alignment=[
        "nodes_ptr",
        "emitted_ptr",
        "drawn_ptr",
        "tokens_ptr",
        "row_start_ptr",
    ],
)
def accept_kernel(
    lengths_ptr,  # [R]
    nodes_ptr,  # [R, num_nodes]
    emitted_ptr,  # [R, num_nodes]
    drawn_ptr,  # [rows]
    tokens_ptr,  # [rows]
    parents_ptr,  # [R, num_nodes]
    row_start_ptr,  # [R + 1]
    num_nodes,
    stride_nodes,
    stride_emitted,
    stride_parents,
    NODES: tl.constexpr,  # num_nodes rounded up to a power of two
):
    request = tl.program_id(0).to(tl.int64)
    begin = tl.load(row_start_ptr + request).to(tl.int64)
    count = tl.load(row_start_ptr + request + 1).to(tl.int64) - begin
    count = tl.minimum(count, num_nodes)
    index = tl.arange(0, NODES)
    real = index < count
    drawn = tl.load(drawn_ptr + begin + index, mask=real, other=-1).to(tl.int64)
    tokens = tl.load(tokens_ptr + begin + index, mask=real, other=-1).to(tl.int64)
    parents_ptr += request * stride_parents
    parents = tl.load(parents_ptr + index, mask=real, other=-1).to(tl.int32)

    path = tl.full([NODES], -1, tl.int32)
    emitted = tl.full([NODES], -1, tl.int64)
    visited = 0
    node = tl.where(count > 0, 0, NODES)  # NODES: the walk has ended
    while node < NODES:
        draw = tl.sum(tl.where(index == node, drawn, 0), 0)
        path = tl.where(index == visited, node, path)
        emitted = tl.where(index == visited, draw, emitted)
        visited += 1
        fits = (parents == node) & (tokens == draw) & (index > node)
        node = tl.min(tl.where(fits, index, NODES), 0)

    inside = index < num_nodes
    lengths_ptr += request
    tl.store(lengths_ptr, tl.maximum(visited - 1, 0).to(lengths_ptr.dtype.element_ty))
    nodes_ptr += request * stride_nodes
    tl.store(nodes_ptr + index, path.to(nodes_ptr.dtype.element_ty), mask=inside)
    emitted_ptr += request * stride_emitted
    tl.store(emitted_ptr + index, emitted.to(emitted_ptr.dtype.element_ty), mask=inside)
