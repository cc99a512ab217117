"""Greedy acceptance: walk down the tree along the target's own choices."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_msd.tree.record import DraftTree


@dataclass(frozen=True)
class Acceptance:
    """Outcome of verifying one tree per request.

    ``lengths [B]``: accepted draft tokens, the root not counted. ``nodes [B, W]``: root and
    accepted nodes, padded with -1 to the deepest node's path length. ``next_tokens [B]``: the
    target's token after the last accepted node. All int64.
    """

    lengths: Tensor
    nodes: Tensor
    next_tokens: Tensor


def accept_greedy(tree: DraftTree, target_tokens: Tensor) -> Acceptance:
    """Accept the longest path whose every token is the target's argmax after its parent.

    Args:
        tree: trees whose siblings have distinct tokens, so that there is one such path at most.
        target_tokens: ``[B, T]`` int64 the target's argmax after each node.
    """
    parents = tree.parents.clamp(min=0)
    fits = tree.tokens == target_tokens.gather(1, parents)
    fits[:, 0] = True
    depth = int(tree.depths.max())
    accepted = fits
    for _ in range(depth):  # a node stands only if its whole path does
        accepted = fits & accepted.gather(1, parents)
    lengths, last = torch.where(accepted, tree.depths, -1).max(1)

    # The accepted nodes are a chain: one per depth. The extra column takes the rejected ones.
    width = depth + 1
    nodes = torch.full((len(lengths), width + 1), -1, device=last.device)
    number = torch.arange(tree.num_nodes, device=last.device).expand_as(accepted)
    nodes.scatter_(1, torch.where(accepted, tree.depths, width), number)
    return Acceptance(lengths, nodes[:, :width], target_tokens.gather(1, last[:, None])[:, 0])
