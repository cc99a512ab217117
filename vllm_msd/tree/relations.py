"""Depths and ancestors of batched trees from their parents, without reading a tensor on the host.

A tree is described by its parents alone; everything else is derived here, in one place, so that
depths and masks can never disagree.
"""

import torch
from torch import Tensor


def chain_parents(batch: int, num_nodes: int, device: torch.device | str = "cpu") -> Tensor:
    """``[batch, num_nodes]`` int64 parents of chains: -1, 0, 1, ..."""
    return torch.arange(-1, num_nodes - 1, device=device).expand(batch, num_nodes)


def tree_relations(parents: Tensor) -> tuple[Tensor, Tensor]:
    """Depths and ancestor bitmasks, both ``[B, T]`` int64, T at most 64.

    Pointer jumping: after i rounds each node knows its nearest ``2 ** i`` ancestors.

    Args:
        parents: ``[B, T]`` int64, -1 at node 0, an earlier node everywhere else.

    Returns:
        depths, 0 at the root; ancestors, bit n set when node n is an ancestor or the node itself.
    """
    node = torch.arange(parents.shape[1], device=parents.device)
    up = parents.clamp(min=0)
    ancestors = (torch.ones_like(parents) << node) | (torch.ones_like(parents) << up)
    depths = (up != node).to(parents.dtype)
    for _ in range((parents.shape[1] - 1).bit_length()):
        ancestors = ancestors | ancestors.gather(1, up)
        depths = depths + depths.gather(1, up)
        up = up.gather(1, up)
    return depths, ancestors
