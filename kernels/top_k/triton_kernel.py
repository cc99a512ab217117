"""Top-k with log-sum-exp in Triton: each part of a row on its own, then the parts together.

A program of the first kernel takes ``GROUPS * WIDTH`` columns of a row. It reads them once for the
log-sum-exp and the best key of every group of ``WIDTH`` columns. Then it takes the best group's
key ``K`` times; after each, only that group is looked at again, for its best key below the one
taken. No copy of the logits is made in any precision.
"""

import triton
import triton.language as tl

from ..ranking import NOTHING, best_keys, key_index, key_value, order_key


@triton.jit
def _real_logits(pointers, mask):
    """As float32; a NaN counts as -inf, and +inf as the largest finite number."""
    x = tl.load(pointers, mask=mask, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, tl.minimum(x, 3.4028234663852886e38), float("-inf"))


@triton.jit
def _log_sum_exp(x):
    """Of the whole tensor, -inf if all of it is."""
    top = tl.max(x)
    reference = tl.where(top == float("-inf"), 0.0, top)
    return reference + tl.log(tl.sum(tl.exp(x - reference)))


@triton.jit(do_not_specialize=["first_column"])
def top_k_parts_kernel(
    parts_ptr,  # [rows, parts, K + 1] int64
    logits_ptr,  # [rows, num_columns]
    num_columns,
    first_column,  # of column 0
    stride_parts,
    stride_logits,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    logits_ptr += row * stride_logits
    parts_ptr += row * stride_parts + part * (K + 1)

    group = tl.arange(0, GROUPS)
    lane = tl.arange(0, WIDTH)
    begin = part * (GROUPS * WIDTH)
    column = begin + group[:, None] * WIDTH + lane[None, :]
    real = column < num_columns
    x = _real_logits(logits_ptr + column, real)
    log_sum = _log_sum_exp(x)
    tl.store(parts_ptr + K, log_sum.to(tl.int32, bitcast=True).to(tl.int64))

    group_best = tl.max(tl.where(real, order_key(x, column), NOTHING), 1)
    for i in range(K):
        best = tl.max(group_best, 0)
        # Nothing left: the first group is looked at in vain.
        found = tl.where(best == NOTHING, begin, key_index(best))
        key = order_key(key_value(best), first_column + found)
        tl.store(parts_ptr + i, tl.where(best == NOTHING, NOTHING, key))
        its_group = (found - begin) // WIDTH
        again = begin + its_group * WIDTH + lane
        wanted = again < num_columns
        keys = order_key(_real_logits(logits_ptr + again, wanted), again)
        next_best = tl.max(tl.where(wanted & (keys < best), keys, NOTHING), 0)
        group_best = tl.where(group == its_group, next_best, group_best)


@triton.jit(do_not_specialize=["num_entries"])
def merge_top_k_kernel(
    log_probs_ptr,  # [rows, K] float32
    ids_ptr,  # [rows, K] int32 or int64
    parts_ptr,  # [rows, num_entries] int64, every (K + 1)-th of them a log-sum-exp
    map_ptr,  # [columns] int32 or int64, or None
    num_entries,
    stride_parts,
    K: tl.constexpr,
    SLOTS: tl.constexpr,  # K rounded up to a power of two
    ENTRIES: tl.constexpr,  # num_entries rounded up
    HAS_MAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, ENTRIES)
    inside = entry < num_entries
    raw = tl.load(parts_ptr + row * stride_parts + entry, mask=inside, other=0)
    is_sum = entry % (K + 1) == K
    sums = raw.to(tl.int32).to(tl.float32, bitcast=True)
    log_sum = _log_sum_exp(tl.where(inside & is_sum, sums, float("-inf")))
    best = best_keys(tl.where(inside & (entry % (K + 1) != K), raw, NOTHING), K, SLOTS)

    slot = tl.arange(0, SLOTS)
    wanted = slot < K
    found = wanted & (best != NOTHING)  # fewer than K columns leave column 0 at -inf
    logit = tl.where(found, key_value(best), float("-inf"))
    # Not above 0, whatever the rounding: a child must not score higher than its parent.
    log_prob = tl.where(logit == float("-inf"), logit, tl.minimum(logit - log_sum, 0.0))
    ids = tl.where(found, key_index(best), 0)
    if HAS_MAP:
        ids = tl.load(map_ptr + ids, mask=wanted, other=0)
    tl.store(log_probs_ptr + row * K + slot, log_prob, mask=wanted)
    tl.store(ids_ptr + row * K + slot, ids.to(ids_ptr.dtype.element_ty), mask=wanted)
