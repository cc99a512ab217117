"""What an attention backend must know of the trees in one forward pass."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ATTRIBUTE = "msd_tree"  # the attribute of vLLM's attention metadata that carries the trees


@dataclass
class TreeRows:
    """The trees of one forward pass, handed to the backend on vLLM's attention metadata.

    KV slots stay linear: bit b of a mask stands for position ``tree_start + b``. A query row at
    position p sees position x if ``x <= p`` and, where its request has a tree, either
    ``x < tree_start`` or bit ``x - tree_start`` of its mask is set.

    Verification: a request's tree, root first, is the last ``seq_len - tree_start`` rows of its
    query; prompt rows may stand before it and are causal. Draft levels: all query rows of a
    request are its newest level, and the older levels' rows lie in the cache from ``tree_start``
    on.

    Make a new object for every forward pass: backends keep what they derived from it on it. The
    levels of one drafting round are linked, the first made plainly, the others from the one
    before with `next_level`.

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

    def next_level(self, ancestors: Tensor) -> "TreeRows":
        """The drafting round's next level: same requests in the same order, same tree starts.

        Args:
            ancestors: ``[rows]`` int64 masks of the new level's rows.
        """
        return TreeRows(self.tree_start, ancestors, self.is_draft, self)

    def applies_to(self, layer: Any) -> bool:
        """Whether this attention layer has to follow the trees, or is causal."""
        return self.is_draft or not getattr(layer, "is_draft_layer", False)


def draft_level(tree_start: Tensor, visible: Tensor, older: TreeRows | None) -> TreeRows:
    """One level of a drafting round, as `vllm_msd.tree.grow_tree` describes it.

    Args:
        tree_start: ``[R]`` int32 position of each request's first drafted row.
        visible: ``[R, k, k * (level + 1)]`` bool, which drafted rows each row of the level sees.
        older: the level before, if any.
    """
    bit = torch.arange(visible.shape[-1], device=visible.device)
    ancestors = (visible.long() << bit).sum(-1).flatten()
    if older is None:
        return TreeRows(tree_start, ancestors, is_draft=True)
    return older.next_level(ancestors)


def attach(attn_metadata: dict[str, Any], tree: TreeRows | None) -> None:
    """Hand the trees to every layer's metadata object; None makes the pass causal.

    Args:
        attn_metadata: vLLM's metadata objects by layer name, shared between layers.
        tree: the pass's trees.
    """
    for metadata in attn_metadata.values():
        setattr(metadata, ATTRIBUTE, tree)
