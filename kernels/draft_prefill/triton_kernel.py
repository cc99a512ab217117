"""The draft's rows in Triton: one launch, a program per request (padding too) and some columns."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_requests", "num_nodes", "width", "num_rows"])
def draft_prefill_kernel(
    input_ids_ptr,  # [num_rows] int32
    positions_ptr,  # [num_rows] int64
    kv_slots_ptr,  # [num_rows] int64
    seq_lens_ptr,  # [padded] int32
    out_ptr,  # [num_rows, num_columns]
    query_start_ptr,  # [padded + 1] int32
    last_rows_ptr,  # [padded] int64
    out_slots_ptr,  # [padded] int64
    nodes_ptr,  # [R, num_nodes] int64
    root_rows_ptr,  # [R] int64
    tree_start_ptr,  # [R] int32
    slots_ptr,  # [R] int32 or int64
    token_ids_ptr,  # [step's rows] int32
    hidden_ptr,  # [step's rows, num_columns]
    emitted_ptr,  # [slots] int64
    block_table_ptr,  # [slots, blocks] int32
    num_requests,
    num_nodes,
    width,
    num_rows,
    num_columns,
    stride_emitted,
    stride_table,
    stride_hidden,
    stride_out,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,  # width rounded up to a power of two
    COLUMNS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    i = tl.arange(0, WIDTH)
    row = request * width + i
    if request >= num_requests:
        if chunk == 0:
            tl.store(query_start_ptr + request + 1, num_requests * width)
            tl.store(last_rows_ptr + request, 0)
            tl.store(out_slots_ptr + request, -1)
            tl.store(seq_lens_ptr + request, 0)
            minus_one = tl.full([WIDTH], -1, tl.int64)
            tl.store(kv_slots_ptr + row, minus_one, mask=(i < width) & (row < num_rows))
            if request == 0:
                tl.store(query_start_ptr, 0)
        return

    inside = i < width
    nodes_ptr += request * num_nodes
    path = tl.load(nodes_ptr + i, mask=inside & (i < num_nodes), other=-1)
    real = path >= 0
    length = tl.sum(real.to(tl.int32), 0)
    root_row = tl.load(root_rows_ptr + request)
    if chunk == 0:
        slot = tl.load(slots_ptr + request).to(tl.int64)
        after = tl.load(nodes_ptr + i + 1, mask=i + 1 < length, other=0)
        token = tl.load(token_ids_ptr + root_row + after, mask=i + 1 < length, other=0)
        emitted = tl.load(emitted_ptr + slot * stride_emitted).to(tl.int32)
        tl.store(input_ids_ptr + row, tl.where(i == length - 1, emitted, token), mask=inside)
        start = tl.load(tree_start_ptr + request)
        position = start + i
        tl.store(positions_ptr + row, position.to(tl.int64), mask=inside)
        block = tl.load(
            block_table_ptr + slot * stride_table + position // BLOCK_SIZE, mask=inside, other=0
        )
        kv_slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(kv_slots_ptr + row, kv_slot, mask=inside)
        tl.store(seq_lens_ptr + request, start + width)
        tl.store(query_start_ptr + request + 1, ((request + 1) * width).to(tl.int32))
        tl.store(last_rows_ptr + request, request * width + length - 1)
        tl.store(out_slots_ptr + request, slot)
        if request == 0:
            tl.store(query_start_ptr, 0)
    column = chunk * COLUMNS + tl.arange(0, COLUMNS)
    in_row = (column < num_columns)[None, :]
    hidden = tl.load(
        hidden_ptr + (root_row + path)[:, None] * stride_hidden + column[None, :],
        mask=real[:, None] & in_row,
        other=0.0,
    )
    tl.store(
        out_ptr + row[:, None] * stride_out + column[None, :],
        hidden,
        mask=inside[:, None] & in_row,
    )
