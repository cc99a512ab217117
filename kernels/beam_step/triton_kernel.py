"""A beam step in Triton: all requests in one launch.

A program takes one request and some columns of its hidden rows. Each finds the request's new beam
for itself, which is less work than a second launch; the one with the first columns writes
everything but the hidden rows. Nothing that a launch reads is written by the same launch.
"""

import triton
import triton.language as tl

from ..ranking import NOTHING, best_keys, key_index, order_key


@triton.jit(
    do_not_specialize=["level", "depth", "max_model_len"],
    do_not_specialize_on_alignment=["first_ptr", "slots_ptr"],
)
def beam_step_kernel(
    log_probs_ptr,  # [R, parents, K] float32
    tokens_ptr,  # [R, parents, K] int32
    scores_ptr,  # [R, candidates] float32
    candidate_tokens_ptr,  # [R, candidates] int32
    candidate_parents_ptr,  # [R, candidates] int32
    beams_ptr,  # [levels, R, K] int32
    ancestors_ptr,  # [levels, R, K] int64
    tree_start_ptr,  # [R] int32
    input_ids_ptr,  # [R * K] int32
    positions_ptr,  # [R * K] int64
    kv_slots_ptr,  # [R * K] int64
    seq_lens_ptr,  # [R] int32
    hidden_ptr,  # [R * K, hidden]
    parent_hidden_ptr,  # [R * parents, hidden]
    first_ptr,  # [R] int64
    slots_ptr,  # [R] int32 or int64
    block_table_ptr,  # [slots, blocks] int32
    level,
    depth,
    max_model_len,
    num_columns,  # of a hidden row
    stride_candidates,
    stride_level,  # of beams and ancestors
    stride_hidden,
    stride_parent_hidden,
    stride_table,
    K: tl.constexpr,
    IS_ROOT: tl.constexpr,  # step 0: the only parent is the root
    SLOTS: tl.constexpr,  # K rounded up to a power of two
    CHILDREN: tl.constexpr,  # all children, rounded up
    BLOCK_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_LAST: tl.constexpr,  # only keep the candidates
):
    PARENTS: tl.constexpr = 1 if IS_ROOT else K
    request = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    scores_ptr += request * stride_candidates
    candidate_tokens_ptr += request * stride_candidates
    candidate_parents_ptr += request * stride_candidates
    this_level = level.to(tl.int64) * stride_level + request * K
    last_level = this_level - stride_level

    # Children by parent, then by rank; candidates are numbered in that order, level by level.
    child = tl.arange(0, CHILDREN)
    real = child < PARENTS * K
    offset = request * (PARENTS * K) + child
    score = tl.load(log_probs_ptr + offset, mask=real, other=0.0)
    if IS_ROOT:
        first_candidate = 0
        parent = tl.full([CHILDREN], -1, tl.int32)
    else:
        first_candidate = K + (level - 1) * K * K
        parent = tl.load(beams_ptr + last_level + child // K, mask=real, other=0)
        score += tl.load(scores_ptr + parent, mask=real, other=0.0)
    if chunk == 0:
        candidate = first_candidate + child
        token = tl.load(tokens_ptr + offset, mask=real)
        tl.store(scores_ptr + candidate, score, mask=real)
        tl.store(candidate_tokens_ptr + candidate, token, mask=real)
        tl.store(candidate_parents_ptr + candidate, parent, mask=real)
    if not IS_LAST:
        best = best_keys(tl.where(real, order_key(score, child), NOTHING), K, SLOTS)
        row = tl.arange(0, SLOTS)
        in_beam = row < K
        chosen = tl.where(in_beam, key_index(best), 0)
        row_of_parent = chosen // K  # 0 for the root's children
        target = request * K + row

        if chunk == 0:
            bit = tl.minimum(level * K + row, 63)  # of rows behind K: a shift by 64 is undefined
            own_bit = tl.full([SLOTS], 1, tl.int64) << bit.to(tl.int64)
            if not IS_ROOT:
                inherited = ancestors_ptr + last_level + row_of_parent
                own_bit |= tl.load(inherited, mask=in_beam, other=0)
            tl.store(beams_ptr + this_level + row, first_candidate + chosen, mask=in_beam)
            tl.store(ancestors_ptr + this_level + row, own_bit, mask=in_beam)

            slot = tl.load(slots_ptr + request).to(tl.int64)
            first = tl.load(first_ptr + request)
            is_real = slot >= 0
            ids = tl.load(tokens_ptr + request * (PARENTS * K) + chosen, mask=in_beam)
            tl.store(input_ids_ptr + target, ids, mask=in_beam)
            rotary = tl.where(is_real, tl.minimum(first + level, max_model_len - 1), 0)
            tl.store(positions_ptr + target, tl.zeros([SLOTS], tl.int64) + rotary, mask=in_beam)
            position = first + level * K + row
            has_slot = in_beam & (position < tl.where(is_real, max_model_len, 0))
            block = tl.load(
                block_table_ptr + slot * stride_table + position // BLOCK_SIZE,
                mask=has_slot,
                other=0,
            ).to(tl.int64)
            kv_slot = tl.where(has_slot, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
            tl.store(kv_slots_ptr + target, kv_slot, mask=in_beam)
            length = tl.minimum(first + (level + 1) * K, max_model_len)
            tl.store(seq_lens_ptr + request, tl.where(is_real, length, 0).to(tl.int32))
            if IS_ROOT:
                fits = is_real & (first + depth * K <= max_model_len)
                tl.store(tree_start_ptr + request, tl.where(fits, first, -1).to(tl.int32))

        column = chunk * COLUMNS + tl.arange(0, COLUMNS)
        wanted = in_beam[:, None] & (column < num_columns)[None, :]
        source = request * PARENTS + row_of_parent
        source_offset = source.to(tl.int64)[:, None] * stride_parent_hidden + column[None, :]
        rows = tl.load(parent_hidden_ptr + source_offset, mask=wanted)
        target_offset = target.to(tl.int64)[:, None] * stride_hidden + column[None, :]
        tl.store(hidden_ptr + target_offset, rows, mask=wanted)
