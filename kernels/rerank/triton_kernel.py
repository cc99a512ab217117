"""Reranking in Triton: one program per request, candidates and nodes side by side in registers."""

import triton
import triton.language as tl

from ..ranking import NOTHING, best_keys, key_index, order_key


@triton.jit(
    do_not_specialize=["num_nodes", "num_candidates", "spare_row", "stride_nodes"],
    do_not_specialize_on_alignment=["slots_ptr", "draft_tokens_ptr"],
)
def rerank_kernel(
    parents_ptr,  # [rows, num_nodes or more] int64, one row per slot and the spare one
    depths_ptr,
    ancestors_ptr,
    draft_tokens_ptr,  # [R, num_nodes - 1] int64
    scores_ptr,  # [R, num_candidates] float32
    tokens_ptr,  # [R, num_candidates] int32
    candidate_parents_ptr,  # [R, num_candidates] int32
    slots_ptr,  # [R] int32 or int64
    num_nodes,
    num_candidates,
    spare_row,
    stride_nodes,
    stride_candidates,
    stride_drafts,
    K: tl.constexpr,
    CANDIDATES: tl.constexpr,  # num_candidates rounded up to a power of two
    NODES: tl.constexpr,  # num_nodes rounded up
    JUMPS: tl.constexpr,  # 2 ** JUMPS levels at least
):
    request = tl.program_id(0).to(tl.int64)
    scores_ptr += request * stride_candidates
    tokens_ptr += request * stride_candidates
    candidate_parents_ptr += request * stride_candidates

    candidate = tl.arange(0, CANDIDATES)
    real = candidate < num_candidates
    score = tl.load(scores_ptr + candidate, mask=real, other=0.0)
    keys = tl.where(real, order_key(score, candidate), NOTHING)
    # Node 0 is the root, node i the i-th best candidate: the list starts one place later.
    best = best_keys(keys, num_nodes - 1, NODES)
    node = tl.arange(0, NODES)
    drafted = node < num_nodes - 1
    chosen = tl.where(drafted, key_index(best), -2)  # of node + 1
    above = tl.load(candidate_parents_ptr + chosen, mask=drafted, other=-1)
    # A parent scores at least as high and comes earlier, so it is a node too.
    same = above[:, None] == chosen[None, :]
    parent = tl.sum(tl.where(same, node[None, :] + 1, 0), 1)

    tokens = tl.load(tokens_ptr + chosen, mask=drafted)
    draft_tokens_ptr += request * stride_drafts
    tl.store(draft_tokens_ptr + node, tokens.to(tl.int64), mask=drafted)
    slot = tl.load(slots_ptr + request).to(tl.int64)
    offset = tl.where(slot < 0, spare_row, slot) * stride_nodes
    tl.store(parents_ptr + offset, -1)
    tl.store(parents_ptr + offset + node + 1, parent.to(tl.int64), mask=drafted)
    tl.store(depths_ptr + offset, 0)
    depth = tl.where(chosen < K, 1, 2 + (chosen - K) // (K * K))
    tl.store(depths_ptr + offset + node + 1, depth.to(tl.int64), mask=drafted)

    # Pointer jumping: after i rounds a node knows its nearest 2 ** i ancestors. Bit n stands for
    # node n; the root's is set everywhere, and a child of the root jumps to itself.
    one = tl.full([NODES], 1, tl.int64)
    own = tl.minimum(node + 1, 63).to(tl.int64)  # a shift by 64 would be undefined
    ancestors = (one << own) | 1
    up = tl.where(parent == 0, node, parent - 1)
    for _ in tl.static_range(JUMPS):
        is_up = up[:, None] == node[None, :]
        ancestors |= tl.sum(tl.where(is_up, ancestors[None, :], 0), 1)
        up = tl.sum(tl.where(is_up, up[None, :], 0), 1)
    tl.store(ancestors_ptr + offset, 1)
    tl.store(ancestors_ptr + offset + node + 1, ancestors, mask=drafted)
