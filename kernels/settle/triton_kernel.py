"""Settling in Triton: all layers, requests and heads in one launch.

A program moves the same columns (bytes of some heads) of every row on one request's path, in one
layer, in increasing order. Row i comes from ``nodes[i] >= i``, so the row it overwrites was read
before, by this program itself, and no other program touches these columns of this request.
"""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["num_nodes"],
    do_not_specialize_on_alignment=["block_table_ptr", "tree_start_ptr", "nodes_ptr"],
)
def settle_kernel(
    words_ptr,  # [blocks, BLOCK_SIZE, heads, WIDTH] the first cache, as integers of one word
    offsets_ptr,  # [caches] int64, how many words each cache lies behind the first
    block_table_ptr,  # [R, max_blocks] int32
    tree_start_ptr,  # [R] int32
    nodes_ptr,  # [R, num_nodes] int64
    num_nodes,
    num_columns,  # heads * WIDTH
    stride_table,
    stride_nodes,
    stride_block,
    stride_slot,
    stride_head,
    WIDTH: tl.constexpr,  # words of one head's row
    BLOCK_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,  # words of one program
    NODES: tl.constexpr,  # num_nodes rounded up to a power of two
    ALIGN: tl.constexpr,  # words that every offset is a multiple of
):
    chunk = tl.program_id(0)
    cache = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    root = tl.load(tree_start_ptr + request)
    if root < 0:
        return
    nodes_ptr += request * stride_nodes
    table_ptr = block_table_ptr + request * stride_table
    index = tl.arange(0, NODES)
    path = tl.load(nodes_ptr + index, mask=index < num_nodes, other=-1)
    length = tl.sum((path >= 0).to(tl.int32), 0)

    column = chunk * COLUMNS + tl.arange(0, COLUMNS)
    in_row = column < num_columns
    offset = tl.multiple_of(tl.load(offsets_ptr + cache), ALIGN)
    head_offset = (column // WIDTH).to(tl.int64) * stride_head
    columns_ptr = words_ptr + offset + head_offset + column % WIDTH
    for i in range(1, length):
        node = tl.load(nodes_ptr + i).to(tl.int32)
        if node != i:
            source = root + node
            target = root + i
            source_block = tl.load(table_ptr + source // BLOCK_SIZE).to(tl.int64)
            target_block = tl.load(table_ptr + target // BLOCK_SIZE).to(tl.int64)
            source_slot = (source % BLOCK_SIZE).to(tl.int64)
            target_slot = (target % BLOCK_SIZE).to(tl.int64)
            source_row = source_block * stride_block + source_slot * stride_slot
            target_row = target_block * stride_block + target_slot * stride_slot
            row = tl.load(columns_ptr + source_row, mask=in_row)
            tl.store(columns_ptr + target_row, row, mask=in_row)
