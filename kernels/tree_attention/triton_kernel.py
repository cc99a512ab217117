"""Tree attention in Triton: one launch over a paged KV cache, split along the context if small.

One program takes ``BLOCK_M`` query rows of one request and one KV head, a row being a (query token,
query head of the group) pair, and walks its share of the keys in tiles of ``TILE``, keeping a
running softmax (maximum, sum, weighted values). The walk has two parts. Tiles that every row sees
whole, which is nearly all of a long context, carry no mask at all; the last few, where the tree or
the causal diagonal lies, test the causal bound and one bit per (row, key).

With ``num_splits > 1`` the keys of a request are dealt out to that many programs, each leaves its
normalised result and the base-2 logarithm of its softmax sum, and ``merge_splits_kernel`` puts them
together; this is exact, not an approximation. All sizes that decide the launch come from tensor
shapes and host integers, never from the contents of a tensor, so the launch can be captured in a
CUDA graph and replayed with other lengths, trees and block tables.
"""

import triton
import triton.language as tl


@triton.jit
def _bit_or(a, b):
    return a | b


@triton.jit
def _fold_tiles(
    acc,  # [BLOCK_M, BLOCK_D] float32: weighted sum of values so far
    row_max,  # [BLOCK_M] float32: largest score so far (base-2 logits)
    row_sum,  # [BLOCK_M] float32: softmax sum so far, relative to row_max
    q,  # [BLOCK_M, BLOCK_D]
    score_scale,
    k_ptr,  # of this KV head
    v_ptr,
    table_ptr,  # of this request
    begin,  # key positions [begin, end) to fold in; begin is a multiple of TILE
    end,
    row_pos,  # [BLOCK_M] position of each row's token
    tree_start,  # position of the root's slot; the sequence length if there is no tree
    bits_low,  # [BLOCK_M] int32, the lower half of each row's ancestor mask
    bits_high,
    any_low,  # their unions over the rows
    any_high,
    stride_kb,
    stride_ks,
    stride_vb,
    stride_vs,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_TREE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs_d = tl.arange(0, BLOCK_D)
    in_head = (offs_d < HEAD_SIZE)[None, :]
    # Masked tiles are few and want registers for their masks: only one of them in flight.
    for start in tl.range(begin, end, TILE, num_stages=3 if MASKED else STAGES):
        pos = start + tl.arange(0, TILE)
        if MASKED:
            wanted = pos < end
            visible = pos[None, :] <= row_pos[:, None]
            if HAS_TREE:
                node = pos - tree_start
                shift = node & 31
                # Masks come as two halves: shifting 64-bit integers costs several instructions.
                half = tl.where((node < 32)[None, :], bits_low[:, None], bits_high[:, None])
                bit = ((half >> shift[None, :]) & 1) != 0
                visible = visible & ((node < 0)[None, :] | ((node < 64)[None, :] & bit))
                # A slot nobody here may look at can hold NaN, and 0 * NaN is NaN: do not load it.
                any_half = tl.where(node < 32, any_low, any_high)
                any_bit = ((any_half >> shift) & 1) != 0
                wanted = wanted & ((node < 0) | ((node < 64) & any_bit))
            block = tl.load(table_ptr + pos // BLOCK_SIZE, mask=wanted, other=0).to(tl.int64)
            load_mask = wanted[:, None] & in_head
        else:
            block = tl.load(table_ptr + pos // BLOCK_SIZE).to(tl.int64)
            load_mask = in_head
        slot = pos % BLOCK_SIZE
        k_offset = (block * stride_kb + slot * stride_ks)[:, None] + offs_d[None, :]
        v_offset = (block * stride_vb + slot * stride_vs)[:, None] + offs_d[None, :]

        k = tl.load(k_ptr + k_offset, mask=load_mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
        if MASKED:
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        reference = new_max
        if MASKED:
            # A row that has seen nothing yet: subtracting -inf from -inf would be NaN.
            reference = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - reference[:, None])
        decay = tl.exp2(row_max - reference)
        row_max = new_max
        row_sum = row_sum * decay + tl.sum(weights, 1)

        v = tl.load(v_ptr + v_offset, mask=load_mask, other=0.0).to(q.dtype)
        acc = tl.dot(weights.to(q.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, row_max, row_sum


# What is read one by one may begin anywhere in an engine's buffers: not a variant of its own.
@triton.jit(
    do_not_specialize=["num_requests", "num_splits"],
    do_not_specialize_on_alignment=[
        "block_table_ptr",
        "seq_lens_ptr",
        "query_start_ptr",
        "tree_start_ptr",
        "ancestors_ptr",
    ],
)
def tree_attention_kernel(
    out_ptr,  # [T, heads, HEAD_SIZE]
    partial_ptr,  # [T, heads, num_splits, HEAD_SIZE] float32, or None
    partial_lse_ptr,  # [T, heads, num_splits] float32, or None
    q_ptr,  # [T, heads, HEAD_SIZE]
    k_ptr,  # [blocks, BLOCK_SIZE, kv_heads, HEAD_SIZE]
    v_ptr,
    block_table_ptr,  # [R, max_blocks] int32
    seq_lens_ptr,  # [R] int32
    query_start_ptr,  # [R + 1] int32
    tree_start_ptr,  # [R] int32, or None
    ancestors_ptr,  # [T] int64, or None
    k_scale_ptr,  # [1] float32, or None
    v_scale_ptr,
    num_requests,
    num_splits,
    score_scale,  # softmax scale times log2(e)
    stride_table,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_ot,
    stride_oh,
    GROUP: tl.constexpr,  # query heads per KV head
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_SIZE rounded up to a power of two
    BLOCK_SIZE: tl.constexpr,  # slots per cache block
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,  # num_splits > 1
    HAS_TREE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    q_block = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)

    # Request i owns the blocks from query_start[i] // BLOCK_Q + i on; a few at its end are empty.
    # Its number is one less than that of the first request whose blocks begin behind this one.
    low: tl.int32 = 0
    high = num_requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // BLOCK_Q + middle <= q_block:
            low = middle + 1
        else:
            high = middle
    request = low - 1
    query_begin = tl.load(query_start_ptr + request)
    query_len = tl.load(query_start_ptr + request + 1) - query_begin
    first_row = (q_block - query_begin // BLOCK_Q - request) * BLOCK_Q
    if first_row >= query_len:
        return

    seq_len = tl.load(seq_lens_ptr + request)
    context = seq_len - query_len
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    row = first_row + offs_m // GROUP
    is_row = (offs_m < BLOCK_Q * GROUP) & (row < query_len)
    token = (query_begin + row).to(tl.int64)
    head = kv_head * GROUP + offs_m % GROUP
    io_mask = is_row[:, None] & (offs_d < HEAD_SIZE)[None, :]
    q_offset = token * stride_qt + head * stride_qh
    q = tl.load(q_ptr + q_offset[:, None] + offs_d[None, :], mask=io_mask, other=0.0)

    # Keys of this program: [begin, end), of which every row sees all before `masked_from`.
    key_end = tl.minimum(context + first_row + BLOCK_Q, seq_len)
    tiles_per_split = tl.cdiv(tl.cdiv(seq_len, TILE), num_splits)
    begin = split * tiles_per_split * TILE
    end = tl.minimum(begin + tiles_per_split * TILE, key_end)
    seen_by_all = context + first_row + 1
    if HAS_TREE:
        tree_start = tl.load(tree_start_ptr + request)
        tree_start = tl.where(tree_start < 0, seq_len, tree_start)
        seen_by_all = tl.minimum(seen_by_all, tree_start)
        row_bits = tl.load(ancestors_ptr + token, mask=is_row, other=0)
        # Bits of nodes behind the row's own, and all bits of a row before the tree, decide nothing
        # for that row; in the union below they would have unwritten slots read.
        own = context + row - tree_start
        reach = (tl.full([BLOCK_M], 2, tl.int64) << tl.minimum(tl.maximum(own, 0), 63)) - 1
        row_bits = tl.where(own < 0, 0, row_bits & reach)
        bits_low = row_bits.to(tl.int32)
        bits_high = (row_bits >> 32).to(tl.int32)
        any_low = tl.reduce(bits_low, 0, _bit_or)
        any_high = tl.reduce(bits_high, 0, _bit_or)
    else:
        tree_start = seq_len
        bits_low = row
        bits_high = row
        any_low = seq_len
        any_high = seq_len
    masked_from = tl.maximum(tl.minimum(seen_by_all // TILE * TILE, end), begin)

    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh
    table_ptr = block_table_ptr + request.to(tl.int64) * stride_table
    if k_scale_ptr is not None:
        score_scale = score_scale * tl.load(k_scale_ptr)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    row_pos = context + row
    for masked in tl.static_range(2):
        acc, row_max, row_sum = _fold_tiles(
            acc,
            row_max,
            row_sum,
            q,
            score_scale,
            k_ptr,
            v_ptr,
            table_ptr,
            masked_from if masked else begin,
            end if masked else masked_from,
            row_pos,
            tree_start,
            bits_low,
            bits_high,
            any_low,
            any_high,
            stride_kb,
            stride_ks,
            stride_vb,
            stride_vs,
            HEAD_SIZE=HEAD_SIZE,
            BLOCK_D=BLOCK_D,
            BLOCK_SIZE=BLOCK_SIZE,
            TILE=TILE,
            MASKED=masked == 1,
            HAS_TREE=HAS_TREE,
            STAGES=STAGES,
            PRECISION=PRECISION,
        )

    # A row that saw no key at all has sum 0 and a zero accumulator: its result is 0.
    result = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    if v_scale_ptr is not None:
        result = result * tl.load(v_scale_ptr)
    if SPLIT:
        cell = (token * tl.num_programs(1) * GROUP + head) * num_splits + split
        tl.store(partial_lse_ptr + cell, row_max + tl.log2(row_sum), mask=is_row)
        if begin < end:
            tl.store(
                partial_ptr + cell[:, None] * HEAD_SIZE + offs_d[None, :], result, mask=io_mask
            )
    else:
        out_offset = token * stride_ot + head * stride_oh
        tl.store(
            out_ptr + out_offset[:, None] + offs_d[None, :],
            result.to(out_ptr.dtype.element_ty),
            mask=io_mask,
        )


@triton.jit(
    do_not_specialize=["num_requests", "num_splits"],
    do_not_specialize_on_alignment=["query_start_ptr"],
)
def merge_splits_kernel(
    out_ptr,  # [T, heads, HEAD_SIZE]
    partial_ptr,  # [T, heads, num_splits, HEAD_SIZE] float32
    partial_lse_ptr,  # [T, heads, num_splits] float32, -inf where a split saw nothing
    query_start_ptr,  # [R + 1] int32
    num_requests,
    num_splits,
    stride_ot,
    stride_oh,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,  # num_splits rounded up to a power of two
):
    """out = sum_s 2^lse_s out_s / sum_s 2^lse_s, one program per (token, head)."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    if token >= tl.load(query_start_ptr + num_requests):
        return
    cell = (token.to(tl.int64) * tl.num_programs(1) + head) * num_splits
    split = tl.arange(0, SPLITS_PADDED)
    offs_d = tl.arange(0, BLOCK_D)
    lse = tl.load(partial_lse_ptr + cell + split, mask=split < num_splits, other=float("-inf"))
    largest = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))
    # Where lse is -inf the partial result was never written.
    partial = tl.load(
        partial_ptr + (cell + split)[:, None] * HEAD_SIZE + offs_d[None, :],
        mask=(lse > float("-inf"))[:, None] & (offs_d < HEAD_SIZE)[None, :],
        other=0.0,
    )
    total = tl.sum(weights, 0)
    result = tl.sum(partial * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(
        out_ptr + token.to(tl.int64) * stride_ot + head * stride_oh + offs_d,
        result.to(out_ptr.dtype.element_ty),
        mask=offs_d < HEAD_SIZE,
    )
