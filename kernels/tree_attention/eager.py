"""Tree attention as its definition reads: one request at a time, dense scores, a boolean mask.

This is the reference the Triton kernel is tested against, and what ``tree_attention`` runs on
tensors that are not on a GPU. It is exact and slow.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_NODES = 64  # of a tree, the root included: bits in one mask
NO_TREE = -1  # tree_start of a request that is plain causal


def ancestor_bits(parents: Sequence[int]) -> Tensor:
    """The masks of one tree: int64 [len(parents)], bit j of mask i set if i may look at node j.

    ``parents[i]`` is the node before i on its path, and -1 for the root, which comes first. Every
    parent stands before its children. A node sees itself, its parent, its parent's parent, ...
    """
    if len(parents) > MAX_NODES:
        raise ValueError(
            f"a tree of {len(parents)} nodes does not fit one 64-bit mask per node: "
            f"keep the root and at most {MAX_NODES - 1} others"
        )
    masks: list[int] = []
    for node, parent in enumerate(parents):
        if not (parent == -1 if node == 0 else 0 <= parent < node):
            raise ValueError(
                f"parents[{node}] is {parent}: expected -1 for the root (node 0) and an earlier "
                "node for every other"
            )
        masks.append((1 << node) | (masks[parent] if node else 0))
    # int64 has no bit 63 of its own: node 63 is the sign.
    return torch.tensor([m - (1 << 64) if m >> 63 else m for m in masks], dtype=torch.int64)


def visible_keys(query_len: int, seq_len: int, tree_start: int, ancestors: Tensor | None) -> Tensor:
    """Who sees whom in one request: bool [query_len, seq_len], True where the query may look.

    The queries are the last ``query_len`` positions of the sequence. Query row i stands at position
    ``p = seq_len - query_len + i`` and sees a key at position ``x`` if

        ``x <= p`` and (``x < tree_start`` or bit ``x - tree_start`` of ``ancestors[i]`` is set)

    so everything before the tree is visible, and rows that stand before the tree (the rest of a
    prompt in the same step) are plain causal. Without a tree (``tree_start`` negative) only the
    first condition counts. Keys more than 63 slots behind ``tree_start`` have no bit: invisible.
    """
    position = torch.arange(seq_len - query_len, seq_len)
    key = torch.arange(seq_len)
    visible = key[None, :] <= position[:, None]
    if tree_start >= 0 and ancestors is not None:
        node = key - tree_start
        has_bit = (node >= 0) & (node < MAX_NODES)
        bit = (ancestors.cpu()[:, None] >> node.clamp(0, MAX_NODES - 1)) & 1
        visible &= (node < 0) | (has_bit & bit.bool())
    return visible


def tree_attention_eager(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    query_start: Tensor, tree_start: Tensor | None, ancestors: Tensor | None, scale: float,
    *, out: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Same arguments and result as ``tree_attention``; computes in float32.

    Slots of the cache that no query may look at can hold anything, NaN included: they never reach
    the result. Rows of ``q`` past ``query_start[-1]`` are padding; their result is left alone.
    """
    if out is None:
        out = torch.zeros_like(q)
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = q.shape[1] // num_kv_heads
    for request in range(seq_lens.shape[0]):
        begin, end = int(query_start[request]), int(query_start[request + 1])
        seq_len = int(seq_lens[request])
        if begin == end:
            continue

        slot = torch.arange(seq_len, device=q.device)
        block = block_table[request, slot // block_size].long()
        keys = k_cache[block, slot % block_size].float()  # [seq_len, num_kv_heads, head_size]
        values = v_cache[block, slot % block_size].float()

        first_node = NO_TREE if tree_start is None else int(tree_start[request])
        masks = None if ancestors is None else ancestors[begin:end]
        visible = visible_keys(end - begin, seq_len, first_node, masks).to(q.device)
        seen = visible.any(dim=0)[:, None, None]
        keys = keys.masked_fill(~seen, 0).repeat_interleave(group, dim=1)
        values = values.masked_fill(~seen, 0).repeat_interleave(group, dim=1)
        if k_scale is not None:
            keys = keys * k_scale
        if v_scale is not None:
            values = values * v_scale

        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys) * scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        # A row whose mask lacks even its own bit sees nothing when the tree starts the sequence.
        weights = weights.nan_to_num(0.0) if not visible.any(dim=1).all() else weights
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)
    return out
