"""What an attention backend must know of the trees in one forward pass."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class TreeRows:
    """The trees of one forward pass.

    KV slots stay linear: bit b of a mask stands for position ``tree_start + b``. A query row at
    position p sees position x if ``x <= p`` and, where its request has a tree, either
    ``x < tree_start`` or bit ``x - tree_start`` of its mask is set.

    Verification: a request's tree, root first, is the last ``seq_len - tree_start`` rows of its
    query; prompt rows may stand before it and are causal. Draft levels: all query rows of a
    request are its newest level, and the older levels' rows lie in the cache from ``tree_start``
    on.

    Make a new object for every forward pass: backends keep what they derived from it on it. The
    levels of one drafting round are linked, see `draft_level`.

    Attributes:
        tree_start: ``[R]`` int32 position of the root (verification) or of the first drafted row
            (draft levels); -1 where the request is causal.
        ancestors: ``[rows]`` int64, which nodes each query row sees, itself included; rows outside
            a tree are not looked at. May be longer than the step has rows.
        is_draft: the trees are the draft's own levels. A draft layer ignores the others: the
            draft's prefill can share the target's metadata, and is causal.
        older: the level before, if any.
        derived: what a backend keeps for this pass.
    """

    tree_start: Tensor
    ancestors: Tensor
    is_draft: bool
    older: "TreeRows | None" = None
    derived: dict[Any, Any] = field(default_factory=dict, repr=False)


def draft_level(tree_start: Tensor, visible: Tensor, older: TreeRows | None) -> TreeRows:
    """One level of a drafting round, as `vllm_msd.tree.grow_tree` describes it.

    Args:
        tree_start: ``[R]`` int32 position of each request's first drafted row, the same tensor for
            all levels of a round.
        visible: ``[R, k, k * (level + 1)]`` bool, which drafted rows each row of the level sees.
        older: the level before, of the same requests in the same order; None at the first.
    """
    bit = torch.arange(visible.shape[-1], device=visible.device)
    ancestors = (visible.long() << bit).sum(-1).flatten()
    return TreeRows(tree_start, ancestors, is_draft=True, older=older)
